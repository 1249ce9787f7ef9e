"""Layers of which each rank computes a part. A layer becomes one by its class: its parameters, hooks and place in the
model stay, and tied weights stay tied.

Source: Megatron-LM (Shoeybi et al. 2019): columns, then rows, and one sum over the ranks for both.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from burnish.parallel.collectives import all_gather, all_reduce, copy_to_region, own_slice, reduce_scatter
from burnish.parallel.group import rank_and_size

SEQUENCE = 1  # the axis of (batch, sequence, features)


class ColumnParallel(nn.Module):
    """A linear layer of which each rank computes some output features: (..., in) -> (..., out / ranks).

    Attributes:
        gathers: whether the result is put together again, (..., out).
        is_in_region: whether the input comes from a module that sums its gradients already.
    """

    group_name: str
    gathers: bool = False
    is_in_region: bool = False

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.is_in_region else copy_to_region(x, self.group_name)
        y: Tensor = super().forward(x)
        return all_gather(y, -1, self.group_name) if self.gathers else y


class RowParallel(nn.Module):
    """A linear layer of which each rank has some input features: (..., in / ranks) -> (..., out), summed over the
    ranks, and then the bias, once.

    Attributes:
        splits: whether the input is whole, (..., in), on each rank.
        scatters: whether each rank has its slice of the sequence only of the result.
    """

    group_name: str
    splits: bool = False
    scatters: bool = False

    def forward(self, x: Tensor) -> Tensor:
        x = own_slice(x, -1, self.group_name) if self.splits else x
        part = F.linear(x, _stored_as_linear(self))
        if self.scatters:
            y = reduce_scatter(part, SEQUENCE, self.group_name)
        else:
            y = all_reduce(part, self.group_name)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return y if bias is None else y + bias


class VocabParallel(nn.Module):
    """An embedding of which each rank has some rows: tokens (...) int64 -> (..., width), summed over the ranks.

    Attributes:
        first_row: whose token this rank has first.
    """

    group_name: str
    first_row: int
    num_embeddings: int

    def forward(self, input: Tensor) -> Tensor:
        mine = input - self.first_row
        elsewhere = (mine < 0) | (mine >= self.num_embeddings)
        found: Tensor = super().forward(mine.masked_fill(elsewhere, 0))
        return all_reduce(found.masked_fill(elsewhere[..., None], 0), self.group_name)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is one that can be divided: exactly an nn.Linear, or Hugging Face's Conv1D."""
    return type(module) is nn.Linear or (_is_conv1d(module) and not isinstance(module, (ColumnParallel, RowParallel)))


def axes_of(module: nn.Module) -> tuple[int, int]:
    """The axes of a linear layer's weight for output and for input features."""
    return (1, 0) if _is_conv1d(module) else (0, 1)


def features_of(module: nn.Module) -> tuple[int, int]:
    """A linear layer's output and input features, as its weight has them."""
    outputs, inputs = axes_of(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[outputs], weight.shape[inputs]


def become_column_parallel(linear: nn.Module, group_name: str, *, gathers: bool = False) -> None:
    """Turns a linear layer whose weight and bias have been cut into a `ColumnParallel` one, in place."""
    _become(ColumnParallel, linear, group_name)
    linear.gathers = gathers  # type: ignore[assignment]


def become_row_parallel(linear: nn.Module, group_name: str, *, splits: bool = False) -> None:
    """Turns a linear layer whose weight has been cut into a `RowParallel` one, in place."""
    _become(RowParallel, linear, group_name)
    linear.splits = splits  # type: ignore[assignment]


def become_vocab_parallel(embedding: nn.Embedding, group_name: str) -> None:
    """Turns an embedding whose weight has been cut into a `VocabParallel` one, in place."""
    _become(VocabParallel, embedding, group_name)
    rank, _ = rank_and_size(group_name)
    rows = embedding.num_embeddings = embedding.weight.shape[0]
    first = embedding.first_row = rank * rows  # type: ignore[assignment]
    padding = None if embedding.padding_idx is None else embedding.padding_idx - first
    embedding.padding_idx = padding if padding is not None and 0 <= padding < rows else None


def note_features(linear: nn.Module) -> None:
    """Has a linear layer say how many features its weight has, after that was cut."""
    names = ("nf", "nx") if _is_conv1d(linear) else ("out_features", "in_features")
    for name, size in zip(names, features_of(linear), strict=True):
        setattr(linear, name, size)


def _become(kind: Any, layer: Any, group_name: str) -> None:
    original: Any = type(layer)
    layer.__class__ = _divided_class(kind, original)
    layer.group_name = group_name


@functools.cache
def _divided_class(kind: Any, layer: Any) -> type[nn.Module]:
    return type(f"{kind.__name__}{layer.__name__}", (kind, layer), {"__module__": __name__, "__doc__": kind.__doc__})


def _stored_as_linear(linear: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.t() if _is_conv1d(linear) else weight


def _is_conv1d(module: Any) -> bool:
    """Whether it is Hugging Face's Conv1D, as it is or divided; transformers need not be there to say no."""
    bases = type(module).__mro__
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in bases)
