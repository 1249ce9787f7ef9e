"""How one input signature is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from burnish.runtime.module import Call
from burnish.tuning import Choice


@dataclass
class Served:
    """How one input signature is served.

    Attributes:
        shapes: the tensor inputs' shapes by name.
        choices: the Impl chosen for each slot, by slot name.
        original_us, optimized_us: time of one call before and after, measured in turn, where it was measured (see
            `Checks.compare`).
        kept_original: why the original model serves this signature, or None.
        cuda_graph: whether a CUDA graph serves it; `not_captured` says why not, where there could be one.
        padding: with padding="remove", how many tokens were left out of the first such call, or why none are.
        seconds: how long it took until the signature could be served.
    """

    shapes: dict[str, tuple[int, ...]]
    choices: dict[str, Choice] = field(default_factory=dict)
    original_us: float | None = None
    optimized_us: float | None = None
    kept_original: str | None = None
    cuda_graph: bool = False
    not_captured: str | None = None
    padding: str | None = None
    seconds: float = 0.0


def shapes_of(call: Call) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's tensors, by the inputs' names."""
    names = [*(f"args[{i}]" for i in range(len(call.args))), *call.kwargs]
    if len(names) != len(call.leaves):
        names = [f"input {i}" for i in range(len(call.leaves))]
    return {name: tuple(leaf.shape) for name, leaf in zip(names, call.leaves, strict=True) if isinstance(leaf, Tensor)}
