"""Masks that models compute from positions: what they say is known, or nothing is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.rewrites.position_masks import causal_shift
from burnish.rewrites.rewrite import same


def in_sequences(x: Tensor, before: int) -> Tensor:
    """As Hugging Face does it: causal, and within the sequences that begin where positions do not go up by one."""
    batch, length = x.shape
    positions = (torch.arange(length) + 0).unsqueeze(0)
    sequences = (torch.diff(positions, prepend=positions[:, :1] - before, dim=-1) != 1).cumsum(-1)
    b, row, column = (
        torch.arange(batch)[:, None, None, None],
        torch.arange(length)[None, None, :, None],
        torch.arange(length)[None, None, None, :],
    )
    sequences, positions = sequences.expand(batch, -1), positions.expand(batch, -1)
    allowed = x.new_ones((), dtype=torch.bool) & (sequences[b, row] == sequences[b, column])
    return allowed & (positions[b, column] <= positions[b, row])


def packed(x: Tensor) -> Tensor:
    return in_sequences(x, before=1)


def compared(x: Tensor) -> Tensor:
    length = x.shape[1]
    return (torch.arange(length)[:, None] >= torch.arange(length)).expand(x.shape[0], 1, length, length)


def with_cache(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1] + 5) <= torch.arange(x.shape[1])[:, None] + 5


def gapped(x: Tensor) -> Tensor:
    return in_sequences(x, before=2)  # the first token begins a sequence of its own, which is the same for all


def window(x: Tensor) -> Tensor:
    return compared(x) & (torch.arange(x.shape[1])[:, None] - 3 <= torch.arange(x.shape[1]))


def turned(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] <= torch.arange(x.shape[1])


def by_values(x: Tensor) -> Tensor:
    return x[:, :, None] >= torch.arange(x.shape[1])


def from_the_end(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return positions[positions - 3][None, :] <= positions[:, None]


def mask_node(fn: Callable[[Tensor], Tensor], mode: str, batch: int) -> fx.Node:
    x = torch.zeros(batch, 8, dtype=torch.int64)
    graph = make_fx(fn, pre_dispatch=True, tracing_mode=mode)(x)
    result: Any = graph.graph.output_node().args[0]
    found: fx.Node = result
    return found


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("fn", "shift"), [(packed, 0), (compared, 0), (with_cache, 5)])
def test_causality(fn: Callable[[Tensor], Tensor], shift: int, mode: str, batch: int) -> None:
    assert same(causal_shift(mask_node(fn, mode, batch)), shift)
    mask = fn(torch.zeros(batch, 8, dtype=torch.int64))
    assert torch.equal(mask, torch.ones_like(mask).tril(shift))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("fn", [gapped, window, turned, by_values, from_the_end])
def test_anything_else_is_left(fn: Callable[[Tensor], Tensor], mode: str) -> None:
    assert causal_shift(mask_node(fn, mode, 2)) is None
