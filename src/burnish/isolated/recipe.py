"""How another process builds a submodule without its weights: JSON data that can only name classes of `transformers`
and `torch.nn`.

Of a Hugging Face model it is the model's class and config: the whole is built on the meta device, where it costs
nothing (8B parameters: 0.1 s), and the submodule taken out, so that whatever the constructors decide for the layer is
decided again. Of a layer of `torch.nn` it is the arguments of its constructor, as its attributes tell them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from burnish.graph_json import NotData, decode, encode

_PLACEMENT = ("device", "dtype")  # what the loaded tensors decide


def recipe_of(model: nn.Module, path: str) -> dict[str, Any] | None:
    """The recipe of the submodule at `path`; None where only the user's code can build it."""
    names = path.split(".")
    for inner in range(len(names), -1, -1):  # the nearest Hugging Face model around it: the smallest one
        outer: Any = model.get_submodule(".".join(names[:inner]))
        if _is_of_transformers(outer):
            return {
                "library": "transformers",
                "class": type(outer).__name__,
                "config": {key: value for key, value in outer.config.to_dict().items() if key != "_name_or_path"},
                "attn_implementation": outer.config._attn_implementation,
                "path": ".".join(names[inner:]),
            }
    module = model.get_submodule(path)
    arguments = _arguments(module) if getattr(nn, type(module).__name__, None) is type(module) else None
    if arguments is None:
        return None
    return {"library": "torch.nn", "class": type(module).__name__, "arguments": arguments}


def build(recipe: Mapping[str, Any]) -> nn.Module:
    """The module on the meta device. ValueError for a recipe that is none, or that asks for code from elsewhere."""
    builders = {"transformers": _build_of_transformers, "torch.nn": _build_of_torch}
    builder = builders.get(recipe.get("library", ""))
    if builder is None:
        raise ValueError(f"a module of {recipe.get('library')!r}: only {' and '.join(builders)} are built")
    with torch.device("meta"):
        return builder(recipe)


# --- transformers -----------------------------------------------------------------------------------------------------


def _is_of_transformers(module: Any) -> bool:
    """Whether it is a model that transformers itself exports under its name."""
    library = type(module).__module__.partition(".")[0]
    if library != "transformers" or not hasattr(module, "config"):
        return False
    import transformers

    return getattr(transformers, type(module).__name__, None) is type(module)


def _build_of_transformers(recipe: Mapping[str, Any]) -> nn.Module:
    from burnish.models.library import quiet_transformers

    with quiet_transformers() as transformers, _offline():
        name, settings, attention = recipe["class"], recipe["config"], recipe["attn_implementation"]
        model_class: Any = getattr(transformers, name, None)
        if not _is_class_of(transformers.PreTrainedModel, model_class):
            raise ValueError(f"transformers has no model {name!r}")
        for value in (attention, *_implementations(settings)):
            if not (value is None or (isinstance(value, str) and value.isidentifier())):
                raise ValueError(f"the implementation {value!r} is no part of transformers")
        config = model_class.config_class.from_dict(settings)
        config._attn_implementation = attention
        module: nn.Module = model_class(config).get_submodule(recipe["path"])
        return module


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No config can make a constructor fetch anything, as those do that name a backbone with its weights."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _implementations(settings: Any) -> Iterator[Any]:
    """What a config says of attention's (or experts') implementation: transformers would fetch `owner/name` from the
    hub and run it."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if "implementation" in key:
                yield value
            else:
                yield from _implementations(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _implementations(value)


# --- torch.nn ---------------------------------------------------------------------------------------------------------


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """What its constructor was probably given; None where its attributes do not tell. `save` tries it out."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in _PLACEMENT or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name, parameter.default)
        if name == "bias" and not isinstance(value, bool):
            value = value is not None
        try:
            found[name] = encode(value, {})
        except NotData:
            return None
    return found


def _build_of_torch(recipe: Mapping[str, Any]) -> nn.Module:
    name, arguments = recipe["class"], recipe["arguments"]
    layer: Any = getattr(nn, name, None)
    if not _is_class_of(nn.Module, layer):
        raise ValueError(f"torch.nn has no layer {name!r}")
    module: nn.Module = layer(**{key: decode(value, ()) for key, value in arguments.items()})
    return module


def _is_class_of(base: type, value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, base)
