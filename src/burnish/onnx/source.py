"""What is to be exported: a module with example inputs, and what those are called in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from burnish.runtime.module import OptimizedModule


@dataclass(frozen=True)
class Source:
    """A module and example inputs.

    Attributes:
        inputs: names for the inputs that are tensors, in order; None: those of the module's parameters.
        axes: words for free sizes, by input and dim.
        more_sizes: further sizes to check at, by these words.
        prefix: what the names of the module's weights begin with more than the model's.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Sequence[str] | None = None
    axes: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    more_sizes: Sequence[Mapping[str, int]] = ()
    prefix: str = ""


def source_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, submodule: str | None, decode: bool
) -> Source:
    """The model itself, one of its submodules with the inputs that it gets there, or its decode step.

    TypeError or ValueError that names the argument, for what cannot be exported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise TypeError("model: this one is optimized already; give the module it was made from")
    if not isinstance(args, tuple):
        raise TypeError(f"args: a tuple of inputs is needed, not {type(args).__name__}; write (x,) for one input")
    if model.training:
        raise ValueError("model is in training mode, where dropout is active; call model.eval() first")
    if decode and submodule is not None:
        raise ValueError("decode=True exports a whole language model; leave out submodule")
    if decode:
        from burnish.onnx.decode import decode_step

        return decode_step(model, args, kwargs)
    if submodule is not None:
        from burnish.isolated import isolate

        return Source(*isolate(model, args, submodule, kwargs))
    return Source(model, args, dict(kwargs or {}))
