"""An `Isolated` on disk: `isolated.json`, `weights.safetensors` and `inputs.safetensors` in a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish import numerics
from burnish._files import write_text
from burnish._unchanged import nothing_changed
from burnish.graph_json import NotData, decode, encode
from burnish.isolated.cut import Isolated, copied
from burnish.isolated.recipe import build

FORMAT = 1
CONFIG, _WEIGHTS, _INPUTS = "isolated.json", "weights.safetensors", "inputs.safetensors"
_TOLD = 3  # names that an error lists


def is_isolated(folder: Path) -> bool:
    """Whether `save` has written this folder."""
    return (folder / CONFIG).is_file()


def check_free(folder: Path) -> None:
    """ValueError where there is something in the way that `save` has not written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a new folder")
    if folder.exists() and not is_isolated(folder) and any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} holds something else; give a new one")


# --- saving -----------------------------------------------------------------------------------------------------------


def save(isolated: Isolated, folder: Path) -> bool:
    """See `Isolated.save`."""
    from safetensors.torch import save_file

    check_free(folder)
    weights, tied = _weights(isolated.module)
    inputs: dict[str, Tensor] = {}
    try:
        encoded = [_encode(value, inputs) for value in (isolated.args, isolated.kwargs)]
    except NotData as error:
        raise ValueError(f"{isolated.path} cannot be saved with its inputs: {error} is no data") from None
    recipe = json.loads(json.dumps(isolated.recipe, default=str))  # as `load` will find it
    data = {
        "format": FORMAT,
        "class": type(isolated.module).__name__,
        "path": isolated.path,
        "model": isolated.model,
        "training": isolated.module.training,
        "recipe": recipe if _builds(recipe, isolated) else None,
        "tied": tied,
        "inputs": dict(zip(("args", "kwargs"), encoded, strict=True)),
        "strides": {file: _strides(tensors) for file, tensors in ((_WEIGHTS, weights), (_INPUTS, inputs))},
    }
    text = json.dumps(data, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        for name, tensors in ((_WEIGHTS, weights), (_INPUTS, inputs)):
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, Path(scratch, name))
        for name in (_WEIGHTS, _INPUTS):
            Path(scratch, name).chmod(0o644)  # safetensors writes what nobody else may read
            Path(scratch, name).replace(folder / name)
    write_text(folder / CONFIG, text)
    return data["recipe"] is not None


def _weights(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers, those too that are no part of a state_dict, in memory of their own; and for each name of
    a tensor that has several the first of them."""
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in _named_tensors(module).items():
        if (known := first.setdefault(id(tensor), name)) != name:
            tied[name] = known
        else:
            found[name] = tensor.detach().to("cpu", copy=True)
    return found, tied


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _strides(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """How those are laid out that are not contiguous: kernels take notice."""
    return {name: list(tensor.stride()) for name, tensor in tensors.items() if not tensor.is_contiguous()}


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """As `burnish.graph_json.encode` does it, tensors by name; each is put into `tensors`."""
    if isinstance(value, Tensor):
        name = next((name for name, known in tensors.items() if known is value), str(len(tensors)))
        if type(value) is not Tensor or value.layout is not torch.strided:
            raise NotData(f"an input of type {type(value).__name__}, {value.layout}")
        tensors[name] = value
        return {"tensor": name}
    if type(value) is list:
        return [_encode(item, tensors) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encode(item, tensors) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item, tensors) for key, item in value.items()}}
    return encode(value, {})


def _builds(recipe: Mapping[str, Any] | None, isolated: Isolated) -> bool:
    """Whether what the recipe builds computes the same from the same weights."""
    if recipe is None:
        return False
    module = isolated.module
    tensors = _named_tensors(module)
    try:
        rebuilt = build(recipe).train(module.training)
        _put(rebuilt, {name: tensor.detach() for name, tensor in tensors.items()})
        outputs, expected = (_outputs(each, isolated) for each in (rebuilt, module))
    except Exception:  # whatever a constructor or a forward says to arguments that were guessed
        return False
    return numerics.check(outputs, expected, expected).ok


def _outputs(module: nn.Module, isolated: Isolated) -> list[Tensor]:
    args, kwargs = copied((isolated.args, isolated.kwargs))
    with torch.no_grad(), nothing_changed(isolated.module):
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, module: nn.Module | None, device: torch.device) -> Isolated:
    """See `Isolated.load`."""
    data = read_config(folder)
    if module is None and data.get("recipe") is None:
        raise ValueError(
            f"{folder} holds the weights of {data.get('class')}, whose code is not in it: give load a module="
        )
    try:
        weights, inputs = (_read_tensors(folder / file, data["strides"][file], device) for file in (_WEIGHTS, _INPUTS))
        weights |= {name: weights[first] for name, first in data["tied"].items()}
        args, kwargs = (_decode(data["inputs"][name], inputs) for name in ("args", "kwargs"))
        module, training = build(data["recipe"]) if module is None else module, bool(data["training"])
        isolated = Isolated(module, args, kwargs, data["path"], data["model"], data["recipe"])
    except Exception as error:  # whatever a constructor says to data that somebody has changed
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    _put(module, weights)
    module.train(training)
    return isolated


def read_config(folder: Path) -> dict[str, Any]:
    """What isolated.json says. ValueError for a folder that has none, or one of another format."""
    file = folder / CONFIG
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG}: `burnish isolate` writes such folders") from None
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file} is not of format {FORMAT}, which this version reads")
    return data


def _read_tensors(file: Path, strides: Mapping[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(file)
    for name, stride in strides.items():
        shape = tensors[name].shape
        if sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 != shape.numel():
            raise NotData(f"strides {stride} for {tuple(shape)}")  # or memory of any size would be asked for
        laid_out = torch.empty_strided(shape, stride, dtype=tensors[name].dtype)
        tensors[name] = laid_out.copy_(tensors[name])
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if type(data) is list:
        return [_decode(item, tensors) for item in data]
    if type(data) is dict and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_decode(item, tensors) for item in content)
        if kind == "dict":
            return {key: _decode(item, tensors) for key, item in content.items()}
    return decode(data, ())


def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts the weights in the places of the module's own. ValueError where names or shapes are not the same; the
    module is then as it was."""
    own = _named_tensors(module)
    if missing := [name for name in own if name not in weights]:
        raise ValueError(f"there are no weights for {_told(missing)} of this {type(module).__name__}")
    if unknown := [name for name in weights if name not in own]:
        raise ValueError(f"this {type(module).__name__} has no {_told(unknown)}, for which there are weights")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            sizes = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(
                f"the weights for {name} have shape {sizes[0]}, this {type(module).__name__}'s have {sizes[1]}"
            )
    parameters: dict[int, nn.Parameter] = {}  # what is tied stays so
    for name, old in own.items():
        owner, _, attribute = name.rpartition(".")
        new = weights[name]
        if isinstance(old, nn.Parameter):
            trained = old.requires_grad and new.is_floating_point()
            new = parameters.setdefault(id(new), nn.Parameter(new, requires_grad=trained))
        setattr(module.get_submodule(owner), attribute, new)


def _told(names: list[str]) -> str:
    return ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")
