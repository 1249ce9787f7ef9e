"""Spellings of norms: each is found once, with its own eps, and what only looks like one is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conftest import normal

aten = torch.ops.aten
EPS = 3e-4


def llama(x: Tensor, weight: Tensor) -> Tensor:
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * hidden.to(x.dtype)


def t5(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(weight.dtype)
    return weight * x


def meta(x: Tensor, weight: Tensor) -> Tensor:
    hidden = x.float()
    return (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * weight


def torch_own(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spelling", [llama, t5, meta, torch_own])
def test_spellings_of_rms_norm(spelling: Callable[..., Any], dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    found = rewrite(spelling, normal(2, 5, 24, dtype=dtype), normal(24, dtype=dtype))
    assert found.ops == Counter(rms_norm=1)
    assert found.calls[0][2] == EPS
    assert aten.rsqrt.default not in found.targets
    assert len(found.verification.units) == 1


def other_dim(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def cubed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS))


def eps_outside(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS))


def of_another(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def scale_used_elsewhere(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (x * scale), scale


@pytest.mark.parametrize("near", [other_dim, cubed, eps_outside, of_another, scale_used_elsewhere])
def test_what_is_no_rms_norm(near: Callable[..., Any], rewrite: Callable[..., Any]) -> None:
    found = rewrite(near, normal(2, 24, 24), normal(24))
    assert not found.ops
    assert "rms_norm" in found.reasons


def test_a_weight_for_each_token_is_no_rms_norm(rewrite: Callable[..., Any]) -> None:
    found = rewrite(llama, normal(2, 5, 24), normal(5, 24))
    assert not found.ops
    assert "weight of shape" in found.reasons


def test_a_float32_weight_on_half_inputs_stays(rewrite: Callable[..., Any]) -> None:
    """The result is float32 there, which the Op's is not."""
    found = rewrite(llama, normal(2, 5, 24, dtype=torch.bfloat16), normal(24))
    assert not found.ops
    assert "the result is torch.float32" in found.reasons


def test_a_number_is_no_weight(rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x: llama(x, 2), normal(2, 5, 24))  # type: ignore[arg-type]
    assert not found.ops
    assert "weight is the number 2" in found.reasons


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "neither"])
def test_spellings_of_layer_norm(affine: str, rewrite: Callable[..., Any]) -> None:
    weights = {"weight and bias": 2, "weight": 1, "neither": 0}[affine]
    given = [normal(24, seed=seed) for seed in range(weights)]

    def norm(x: Tensor, *weights: Tensor) -> Tensor:
        weight, bias = (*weights, None, None)[:2]
        return F.layer_norm(x, (24,), weight, bias, EPS)

    found = rewrite(norm, normal(2, 5, 24), *given)
    assert found.ops == Counter(layer_norm=1)
    ((_, weight, bias, eps),) = found.calls
    assert (weight is None, bias is None, eps) == (weights < 1, weights < 2, EPS)


def test_layer_norm_over_two_dims_stays(rewrite: Callable[..., Any]) -> None:
    found = rewrite(nn.LayerNorm((5, 24)), normal(2, 5, 24))
    assert not found.ops
    assert "normalized_shape has 2 entries" in found.reasons
