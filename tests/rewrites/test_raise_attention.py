"""Spellings of attention; and what only looks like it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .conftest import normal

aten = torch.ops.aten
HEADS, WIDTH = 4, 16
SCALE = 7  # where it is among attention's arguments


def qkv(queries: int = 5, keys: int = 7, heads: int = HEADS, kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, heads, queries, WIDTH), (2, kv_heads, keys, WIDTH), (2, kv_heads, keys, WIDTH))
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return q, k, v


# --- torch's own function ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, (False, None)), ({"scale": 0.3}, (False, 0.3)), ({"is_causal": True}, (True, None))],
    ids=["plain", "scale", "causal"],
)
def test_sdpa(settings: dict[str, Any], expected: tuple[Any, ...], rewrite: Callable[..., Any]) -> None:
    x = qkv(7, 7)[0]
    found = rewrite(lambda q: F.scaled_dot_product_attention(q, q.sin(), q.cos(), **settings), x)
    assert found.ops == Counter(attention=1)
    is_causal, window, scale, *dropout = found.calls[0][5:]
    assert ((is_causal, scale), window, dropout) == (expected, None, [0.0, None])


@pytest.mark.parametrize("mask", [torch.bool, torch.float32], ids=["bool", "float"])
def test_sdpa_with_a_mask(mask: torch.dtype, rewrite: Callable[..., Any]) -> None:
    bias = normal(2, 1, 5, 7) > 0 if mask is torch.bool else normal(2, 1, 5, 7)
    found = rewrite(F.scaled_dot_product_attention, *qkv(), bias)
    assert found.ops == Counter(attention=1)
    assert found.calls[0][3].op == "placeholder"


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_of_one_head_without_a_dim_for_it(masked: bool, rewrite: Callable[..., Any]) -> None:
    inputs = [x[:, 0] for x in qkv()] + ([normal(2, 5, 7)] if masked else [])
    assert rewrite(F.scaled_dot_product_attention, *inputs).ops == Counter(attention=1)


def test_sdpa_with_grouped_heads(rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *qkv(kv_heads=2))
    assert found.ops == Counter(attention=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"is_causal": True}, "is_causal is aligned top-left here and the two lengths may differ"),
        ({"dropout_p": 0.1}, "dropout of 0.1 on the attention weights is active, which no kernel has on cpu"),
    ],
    ids=["causal, lengths differ", "dropout"],
)
def test_sdpa_that_stays(settings: dict[str, Any], reason: str, rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings), *qkv())
    assert not found.ops
    assert reason in found.reasons


# --- written out ---

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda scores: scores * 0.25,
    "over": lambda scores: scores / math.sqrt(WIDTH),
    "unscaled": lambda scores: scores,
}
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda scores, mask: scores + torch.where(mask, 0.0, -1e30),
    "filled": lambda scores, mask: scores.masked_fill(mask.logical_not(), float("-inf")),
    "filled where 0": lambda scores, mask: scores.masked_fill(mask.long() == 0, -1e9),
    "unmasked": lambda scores, mask: scores,
}
SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "functional": lambda scores: F.softmax(scores, dim=-1),
    "float softmax": lambda scores: F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype),
}


@pytest.mark.parametrize(("scale", "mask", "softmax"), list(itertools.product(SCALES, MASKS, SOFTMAX)))
def test_attention_written_out(scale: str, mask: str, softmax: str, rewrite: Callable[..., Any]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        scores = MASKS[mask](SCALES[scale](q @ k.transpose(-2, -1)), allowed)
        return torch.matmul(SOFTMAX[softmax](scores), v)

    allowed = torch.tril(torch.ones(5, 7, dtype=torch.bool), 2)
    found = rewrite(attention, *qkv(), allowed)
    assert found.ops == Counter(attention=1)
    assert found.calls[0][SCALE] == (1.0 if scale == "unscaled" else 0.25)
    assert (found.calls[0][3] is None) == (mask == "unmasked")
    assert {aten.softmax.int, aten.matmul.default}.isdisjoint(found.targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_attention_written_out_in_half_precision(dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * 0.25
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    assert rewrite(attention, *(x.to(dtype) for x in qkv())).ops == Counter(attention=1)


def other_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-2) @ v


def hardly_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.25
    return scores.masked_fill(scores[:1, :1].detach() > 1e6, -5.0).softmax(-1) @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
    return weights @ v, weights


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1) * 0.25).softmax(-1), 0.1, training=True) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (30 * torch.tanh(q @ k.transpose(-2, -1) / 30)).softmax(-1) @ v


@pytest.mark.parametrize("near", [other_dim, hardly_masked, weights_returned, with_dropout, capped])
def test_what_is_no_attention(near: Callable[..., Any], rewrite: Callable[..., Any]) -> None:
    found = rewrite(near, *qkv(7, 7))
    assert not found.ops
    assert aten.softmax.int in found.targets
    assert "attention" in found.reasons


def test_a_fill_that_does_not_mask_is_told(rewrite: Callable[..., Any]) -> None:
    mask = torch.tril(torch.ones(5, 7)) == 0

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * 0.25).masked_fill(mask, -5.0).softmax(-1) @ v

    found = rewrite(attention, *qkv(), mask)
    assert not found.ops
    assert "filled with -5.0, which does not mask" in found.reasons


# --- what stands around it ---


def by_interleaving(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def by_expanding(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, 2, length, width).reshape(batch, 2 * heads, length, width)


@pytest.mark.parametrize("repeat", [by_interleaving, by_expanding])
def test_repeated_heads_are_taken_as_they_were(repeat: Callable[..., Tensor], rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), *qkv(kv_heads=2))
    assert [node.op for node in found.calls[0][:3]] == ["placeholder"] * 3


def test_heads_repeated_in_another_order_stay(rewrite: Callable[..., Any]) -> None:
    """`tile` puts the copies of all heads one after the other: another head's keys would be used."""
    found = rewrite(
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *qkv(kv_heads=2)
    )
    assert [node.op for node in found.calls[0][:3]] == ["placeholder", "call_function", "call_function"]


def test_heads_of_keys_alone_repeated_stay(rewrite: Callable[..., Any]) -> None:
    q, k, _ = qkv(kv_heads=2)
    v = qkv()[2]
    found = rewrite(lambda q, k, v: F.scaled_dot_product_attention(q, by_interleaving(k), v), q, k, v)
    assert [node.op for node in found.calls[0][:3]] == ["placeholder", "call_function", "placeholder"]


def test_a_scale_of_the_queries_goes_to_the_scores(rewrite: Callable[..., Any]) -> None:
    def scaled(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = (x * 0.5).view(2, 5, HEADS, WIDTH).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=0.25)

    found = rewrite(scaled, normal(2, 5, HEADS * WIDTH), *qkv()[1:])
    assert found.ops == Counter(attention=1)
    assert found.calls[0][SCALE] == 0.125
    assert aten.mul.Tensor not in found.targets


def test_scaled_queries_that_others_need_stay(rewrite: Callable[..., Any]) -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q = q * 0.5
        return F.scaled_dot_product_attention(q, k, v, scale=0.25), q

    found = rewrite(scaled, *qkv())
    assert found.calls[0][SCALE] == 0.25
