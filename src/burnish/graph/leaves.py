"""What a pattern function writes for "a call of some submodule": by name, or by type and settings."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from burnish.graph._words import words


def call_module(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """In a pattern: a call of a submodule whose name matches the regular expression `name`.

    The expression must match the submodule's own name or its whole path: `fc1` hits `layers.0.fc1`, never `fc10`. The
    other arguments are those of the call. In a replacement, `name` is the same text as in the pattern, or the path of
    a submodule of the model, and the call goes to that submodule.

    Raises TypeError outside of a pattern or replacement, ValueError where `name` is no valid regular expression.
    """
    if not isinstance(name, str):
        raise TypeError(f"call_module: name must be a regular expression in a string, got {type(name).__name__}")
    try:
        re.compile(name)
    except re.error as error:
        raise ValueError(f"call_module: name {name!r} is not a regular expression: {error}") from error
    return _record(LeafCall(name), "call_module", args, kwargs)


def module(kind: type[nn.Module], /, *args: Any, **settings: Any) -> Any:
    """In a pattern: a call of a submodule of exactly the type `kind`, with these settings.

    `args` are the arguments of the call. A setting is an attribute that must be equal (`eps=1e-5`), a function of the
    attribute that must be true (`in_features=lambda n: n % 16 == 0`), or for parameters whether there must be one
    (`bias=True`; `affine=True` is `weight=True`). Settings that are not named are free.

    Raises TypeError outside of a pattern or where `kind` is no module class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"module: kind must be a class of modules such as nn.LayerNorm, got {kind!r}")
    return _record(LeafCall(kind, settings), "module", args, {})


class LeafCall:
    """The target of a pattern node that stands for a call of a submodule: by name (a regular expression) or type."""

    __name__ = "leaf_call"  # what fx names the node after

    def __init__(self, wanted: str | type[nn.Module], settings: dict[str, Any] | None = None) -> None:
        self.wanted = wanted
        self.settings = settings or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.label}: a pattern is there to be matched, it cannot be called")

    @property
    def label(self) -> str:
        """The name under which a match lists the submodule found."""
        return self.wanted if isinstance(self.wanted, str) else self.wanted.__name__

    def difference(self, target: str, candidate: nn.Module) -> str | None:
        """Why the submodule `candidate` at path `target` is not what is asked for; None where it is."""
        wanted = self.wanted
        if isinstance(wanted, str):
            if re.fullmatch(wanted, target) or re.fullmatch(wanted, target.rpartition(".")[2]):
                return None
            return f"the submodule is called {target} where the pattern has {wanted!r}"
        if type(candidate) is not wanted:
            return f"{target} is a {type(candidate).__name__} where the pattern has {wanted.__name__}"
        return next(filter(None, (_setting_difference(candidate, *item) for item in self.settings.items())), None)


def _record(target: LeafCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for value in (*args, *kwargs.values()):
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", target, args, kwargs)
    raise TypeError(f"{name}: only has a meaning inside a pattern that is traced symbolically")


def is_leaf_call(node: fx.Node) -> bool:
    """Whether a pattern's node stands for the call of a submodule by name or type."""
    return isinstance(node.target, LeafCall)


_MISSING = object()


def _setting_difference(candidate: nn.Module, name: str, wanted: Any) -> str | None:
    value = getattr(candidate, "weight" if name == "affine" else name, _MISSING)
    if value is _MISSING:
        return f"{type(candidate).__name__} has no {name}"
    if isinstance(wanted, bool) and not isinstance(value, bool):
        present = value is not None
        return (
            None
            if present is wanted
            else f"it has {'a' if present else 'no'} {name} where the pattern wants {name}={wanted}"
        )
    if callable(wanted) and not isinstance(wanted, type):
        return None if wanted(value) else f"{name}={value!r} is refused by the pattern"
    return None if value == wanted else f"{name} is {value!r} where the pattern has {wanted!r}"


# Attributes of torch.nn modules that say how large, not what is computed.
_SIZES = words(
    """
    in_features out_features in1_features in2_features in_channels out_channels num_features num_embeddings
    embedding_dim normalized_shape num_channels kernel_size hidden_size input_size embed_dim kdim vdim head_dim
    training
    """
)


def module_difference(wanted: nn.Module, candidate: nn.Module) -> str | None:
    """Why two modules do not compute the same function of input and weights; None where they do.

    The type decides, and the settings of `torch.nn` modules (eps, stride, whether there is a bias); sizes don't.
    """
    if type(wanted) is not type(candidate):
        return f"it is a {type(candidate).__name__} where the pattern has {type(wanted).__name__}"
    for name, parameter in (*wanted._parameters.items(), *wanted._buffers.items()):
        other = getattr(candidate, name, None)
        if (parameter is None) != (other is None):
            has, wants = ("no" if value is None else "a" for value in (other, parameter))
            return f"it has {has} {name} where the pattern has {wants} {name}"
    if not type(wanted).__module__.startswith("torch.nn."):
        return None
    for name, value in vars(wanted).items():
        if name.startswith("_") or name in _SIZES or not isinstance(value, (bool, int, float, str, tuple, type(None))):
            continue
        other = getattr(candidate, name, None)
        if other != value:
            return f"{name} is {other!r} where the pattern has {value!r}"
    return None
