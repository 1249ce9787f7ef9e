"""What hangs on an Op: its implementations, what it costs, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Result: TypeAlias = Any  # a Tensor, or a tuple of Tensors for an Op with several results


class ImplUnavailable(ValueError):
    """An Impl that was asked for by name cannot take these inputs; the message holds every reason."""

    def __init__(self, op: str, impl: str, reasons: list[str]) -> None:
        super().__init__(f"{op}: the Impl {impl!r} cannot take these inputs: " + "; ".join(reasons))
        self.op, self.impl, self.reasons = op, impl, reasons


@dataclass(frozen=True)
class Cost:
    """What one call needs at the least: floating-point operations, and bytes read and written once each."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Sample:
    """One set of inputs to try an Op on; the label names what is particular about it."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Impl:
    """One implementation of an Op: `fn` is a plain callable with the Op's signature and passes no dispatcher.

    `fn` takes inputs that `why_not` found nothing against, never writes to them, and returns fresh memory laid out like
    the reference's result. `differentiable` says that autograd can go through `fn` itself. `configs`, where an Impl has
    them, lists ways to run `fn` on given inputs (its keyword `config`), the most promising first; each has a distinct
    str(). Without the keyword `fn` uses the first. `in_place`, of an Op that donates, takes what `fn` takes, writes
    into the donated arguments, which share memory with nothing, and returns these same tensors in the results' places.
    `named_only` says why it is taken only where it is asked for by name; empty for all others. With `live_rows`, `fn`
    takes a keyword of that name, an int32 on the inputs' device: rows of the results from there on, all dimensions but
    the last one taken together, are not wanted. What they hold is undefined, and `fn` spares what work it can.
    """

    name: str
    fn: Callable[..., Result]
    differentiable: bool
    description: str
    reasons: Callable[..., list[str]]  # takes every argument of the Op positionally, as Op.bind gives them
    bind: Callable[..., tuple[Any, ...]]
    configs: Callable[..., Sequence[Any]] | None = None
    in_place: Callable[..., Result] | None = None
    named_only: str = ""
    live_rows: bool = False

    def why_not(self, *args: Any, **kwargs: Any) -> list[str]:
        """Every reason why this Impl cannot take these inputs; empty when it can."""
        return self.reasons(*self.bind(*args, **kwargs))
