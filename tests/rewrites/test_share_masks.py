"""Padding masks on the CPU: one additive mask for all layers that mask alike, and none where none is to be made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish import ops
from burnish.capture import capture
from burnish.rewrites.share_masks import padding_bias, share_padding_masks

from .conftest import Function, normal

aten = torch.ops.aten

LENGTH = 6
PADDED = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * 2])


def heads(seed: int = 0, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(2, 3, length, 8, seed=seed, dtype=dtype)


def masks(found: Any) -> list[Any]:
    return [node for node in found.graph.nodes if node.target is padding_bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (True, 3), (False, 2)])
def test_layers_that_mask_alike_share_one(
    is_causal: bool, window: int | None, dtype: torch.dtype, rewrite: Callable[..., Any]
) -> None:
    def layers(x: Tensor, padding: Tensor) -> Tensor:
        for _ in range(3):
            x = ops.attention(x, x, x, None, padding, is_causal, window, 0.3)
        return x

    found = rewrite(layers, heads(dtype=dtype), PADDED)
    assert found.fused.matches["padding masks shared"] == 3
    (mask,) = masks(found)
    assert [call[3:8] for call in found.calls] == [(mask, None, False, None, 0.3)] * 3
    assert mask.meta["val"].dtype == dtype
    assert len(found.verification.units) == 3


def test_layers_that_mask_differently_do_not(rewrite: Callable[..., Any]) -> None:
    def layers(x: Tensor, y: Tensor, padding: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return (
            ops.attention(x, x, x, None, padding),
            ops.attention(x, x, x, None, other),
            ops.attention(x, x, x, None, padding, True),
            ops.attention(x, x, x, None, padding, True, 3),
            ops.attention(y, x, x, None, padding, True),
            ops.attention(x.double(), x.double(), x.double(), None, padding),
        )

    found = rewrite(layers, heads(), heads(length=4), PADDED, PADDED.flip(0))
    assert len(masks(found)) == 6
    assert found.ops == Counter(attention=6)


def test_what_has_no_padding_or_a_bias_stays(rewrite: Callable[..., Any]) -> None:
    def layers(x: Tensor, bias: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(x, x, x, None, None, True), ops.attention(x, x, x, bias, padding)

    found = rewrite(layers, heads(), normal(1, 1, LENGTH, LENGTH), PADDED)
    assert "padding masks shared" not in found.fused.matches
    assert not masks(found)


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("meta", 0)])
def test_other_devices_take_padding_as_such(device: str, count: int) -> None:
    program = capture(Function(lambda x, padding: ops.attention(x, x, x, None, padding)), (heads(), PADDED))
    x = next(node for node in program.graph_module.graph.nodes if node.op == "placeholder")
    x.meta["val"] = x.meta["val"].to(device)
    assert share_padding_masks(program.graph_module).count == count


@pytest.mark.parametrize(
    ("hidden", "dtype", "passes"),
    [
        (lambda mask: mask == 0, torch.bool, 0),
        (lambda mask: mask == 0, torch.float32, 1),
        (lambda mask: mask == 0, torch.int64, 1),
        (lambda mask: ~mask, torch.bool, 0),
        (lambda mask: mask.logical_not(), torch.bool, 0),
        (lambda mask: mask.logical_not(), torch.int64, 1),
    ],
)
def test_a_mask_that_is_negated_is_read_in_place(
    hidden: Callable[[Tensor], Tensor], dtype: torch.dtype, passes: int, rewrite: Callable[..., Any]
) -> None:
    def layer(x: Tensor, mask: Tensor) -> Tensor:
        scores = (x @ x.transpose(-2, -1) * 0.3).masked_fill(hidden(mask), -1e4)
        return scores.softmax(-1) @ x

    found = rewrite(layer, heads(), torch.ones(LENGTH, LENGTH, dtype=dtype).tril())
    assert found.fused.matches["boolean masks"] == 1
    made = [
        node for node in found.graph.nodes if node.op == "call_function" and node.target is not ops.attention.overload
    ]
    assert [node.target for node in made] == [torch.ops.aten.ne.Scalar] * passes


def test_an_integer_padding_mask_is_read_as_it_is(rewrite: Callable[..., Any]) -> None:
    def layer(x: Tensor, padding: Tensor) -> Tensor:
        return ops.attention(x, x, x, None, padding.to(torch.bool), True, 3)

    found = rewrite(layer, heads(), PADDED)
    assert found.fused.matches["integer padding masks"] == 1
    (mask,) = masks(found)
    assert mask.args[2].op == "placeholder"
