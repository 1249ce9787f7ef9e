"""Several linear layers of one input as one product."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tail = Callable[[Tensor], Tensor]


class FusedLinears(nn.Module):
    """x (..., in_features) -> a tuple with one (..., out_features) for each of the Linears, by one matrix product.

    The weights are the Linears' weights, one below the other; `tail` is applied to each result. For `Schedule.replace`:

        sch["self_attn"].replace(FusedLinears, sch["self_attn"].find(r"[qkv]_proj"))

    Attributes:
        merged: for each of its parameters the parameters that it was made of, in order, as weak references, and how
            many rows each has.
    """

    def __init__(self, *linears: nn.Linear, tail: Tail | None = None) -> None:
        """ValueError where the Linears differ in what must be alike to merge them."""
        super().__init__()
        _check(linears)
        self.in_features = linears[0].in_features
        self.out_features = [linear.out_features for linear in linears]
        self.tail = tail
        self.merged: dict[str, tuple[tuple[weakref.ref[Tensor], int], ...]] = {}
        self.weight: nn.Parameter = self._merge("weight", [linear.weight for linear in linears])
        self.bias: nn.Parameter | None = None
        if linears[0].bias is not None:
            self.bias = self._merge("bias", [linear.bias for linear in linears])

    @classmethod
    def from_modules(cls, *linears: nn.Module) -> FusedLinears:
        return cls(*linears)  # type: ignore[arg-type]

    @classmethod
    def with_tail(cls, tail: Tail) -> WithTail:
        """For `Schedule.replace`: FusedLinears that apply a function to each result, such as splitting into heads."""
        if not callable(tail):
            raise TypeError(f"tail must be a function of one tensor, got {type(tail).__name__}")
        return WithTail(tail)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        together = F.linear(x, self.weight, self.bias).split(self.out_features, dim=-1)
        parts = tuple(together[i] for i in range(len(self.out_features)))  # so that fx can trace it
        return parts if self.tail is None else tuple(self.tail(part) for part in parts)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _merge(self, name: str, parts: Sequence[Tensor]) -> nn.Parameter:
        self.merged[name] = tuple((weakref.ref(part), part.shape[0]) for part in parts)
        return nn.Parameter(torch.cat([part.detach() for part in parts]), parts[0].requires_grad)


@dataclass(frozen=True)
class WithTail:
    """Makes FusedLinears with a tail."""

    tail: Tail

    def from_modules(self, *linears: nn.Module) -> FusedLinears:
        return FusedLinears(*linears, tail=self.tail)  # type: ignore[arg-type]

    def written(self, write: Callable[[Any], str]) -> str:
        """As Python."""
        return f"burnish.scheduling.FusedLinears.with_tail({write(self.tail)})"


def _check(linears: tuple[nn.Linear, ...]) -> None:
    if not linears:
        raise ValueError("FusedLinears: there are no Linears to merge")
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise ValueError(f"FusedLinears: a {type(linear).__name__} cannot be merged, only Linears")
    for what, of in _ALIKE.items():
        values = [of(linear) for linear in linears]
        if any(value != values[0] for value in values):
            raise ValueError(f"FusedLinears: the Linears differ in {what}: {', '.join(map(str, values))}")


_ALIKE: dict[str, Callable[[nn.Linear], Any]] = {
    "in_features": lambda linear: linear.in_features,
    "whether they have a bias": lambda linear: linear.bias is not None,
    "dtype": lambda linear: linear.weight.dtype,
    "device": lambda linear: linear.weight.device,
    "requires_grad": lambda linear: [p.requires_grad for p in linear.parameters()],
}
