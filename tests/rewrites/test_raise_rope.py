"""Rotary position embedding by halves: found once for each tensor turned, and nothing that only looks like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import normal

HEADS, LENGTH, HEAD_DIM = 3, 5, 8


def turn(x: Tensor, cos: Tensor, sin: Tensor, half: int = HEAD_DIM // 2) -> Tensor:
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def turn_with_free_head_dim(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn(x, cos, sin, half=x.shape[-1] // 2)


def heads(x: Tensor) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D), with a head_dim that is fixed as in a model."""
    return x.view(x.shape[0], x.shape[1], HEADS, HEAD_DIM).transpose(1, 2)


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(2, LENGTH, HEADS * HEAD_DIM, dtype=dtype)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_split(batch: int, dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    cos_sin = tables(batch, 1, LENGTH, HEAD_DIM, dtype=dtype)
    found = rewrite(lambda x, cos, sin: turn(heads(x), cos, sin), hidden(dtype), *cos_sin)
    assert found.ops == Counter(rope=1)
    ((_, cos, sin, interleaved),) = found.calls
    assert [cos.meta["val"].dim(), sin.meta["val"].dim(), interleaved] == [3, 3, False]
    assert torch.ops.aten.neg.default not in found.targets


def test_queries_and_keys_share_the_tables(rewrite: Callable[..., Any]) -> None:
    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return turn(heads(q), cos, sin), turn(heads(k), cos, sin)

    found = rewrite(both, hidden(), hidden() + 1, *tables(2, LENGTH, HEAD_DIM))
    assert found.ops == Counter(rope=2)
    assert found.calls[0][1:] == found.calls[1][1:]


def test_part_of_the_head(rewrite: Callable[..., Any]) -> None:
    def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = heads(x)
        return torch.cat((turn(x[..., :6], cos, sin, half=3), x[..., 6:]), dim=-1)

    found = rewrite(partly, hidden(), *tables(1, 1, LENGTH, 6))
    assert found.ops == Counter(rope=1)


NEAR = {
    "not in the middle": (
        lambda x, cos, sin: turn(heads(x), cos, sin, half=3),
        (1, 1, LENGTH, HEAD_DIM),
        "splits head_dim=8 at 3, not in the middle",
    ),
    "free head_dim": (turn_with_free_head_dim, (1, 1, LENGTH, HEAD_DIM), "not in the middle"),
    "tables for each head": (
        lambda x, cos, sin: turn(heads(x), cos, sin),
        (1, HEADS, LENGTH, HEAD_DIM),
        "cos and sin differ from head to head",
    ),
    "tables of two dims": (
        lambda x, cos, sin: turn(heads(x), cos, sin),
        (LENGTH, HEAD_DIM),
        "x, cos, sin have 4, 2, 2 dims, not 4",
    ),
    "numbers": (
        lambda x, cos, sin: turn(heads(x), 0.5, 0.25) + cos + sin,  # type: ignore[arg-type]
        (1, 1, LENGTH, HEAD_DIM),
        "cos or sin is a number",
    ),
    "a table for all positions": (
        lambda x, cos, sin: turn(heads(x), cos, sin),
        (1, 1, 1, HEAD_DIM),
        "cos has shape (1, 1, 8)",
    ),
    "the other half negated": (
        lambda x, cos, sin: heads(x) * cos + torch.cat((heads(x)[..., 4:], -heads(x)[..., :4]), dim=-1) * sin,
        (1, 1, LENGTH, HEAD_DIM),
        "where the pattern has neg",
    ),
    "turned backwards": (
        lambda x, cos, sin: heads(x) * cos - torch.cat((-heads(x)[..., 4:], heads(x)[..., :4]), dim=-1) * sin,
        (1, 1, LENGTH, HEAD_DIM),
        "where the pattern has add",
    ),
    "interleaved": (
        lambda x, cos, sin: (
            heads(x) * cos + torch.stack((-heads(x)[..., 1::2], heads(x)[..., ::2]), dim=-1).flatten(-2) * sin
        ),
        (1, 1, LENGTH, HEAD_DIM),
        "where the pattern has cat",
    ),
}


@pytest.mark.parametrize(("near", "shape", "reason"), NEAR.values(), ids=NEAR)
def test_what_is_no_rope(
    near: Callable[..., Any], shape: tuple[int, ...], reason: str, rewrite: Callable[..., Any]
) -> None:
    x = heads(hidden()).contiguous() if near is turn_with_free_head_dim else hidden()
    found = rewrite(near, x, *tables(*shape))
    assert not found.ops
    assert reason in found.reasons


def test_float32_tables_on_half_inputs_stay(rewrite: Callable[..., Any]) -> None:
    """The result is float32 there, which the Op's is not."""
    found = rewrite(
        lambda x, cos, sin: turn(heads(x), cos, sin), hidden(torch.bfloat16), *tables(1, 1, LENGTH, HEAD_DIM)
    )
    assert not found.ops
    assert "the result is torch.float32, x is torch.bfloat16" in found.reasons
