"""Spellings of linear layers and of their activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conftest import normal

aten = torch.ops.aten


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_google(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (F.relu, "relu"),
    "silu": (F.silu, "silu"),
    "tanh": (torch.tanh, "tanh"),
    "gelu": (F.gelu, "gelu"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "gelu written out": (gelu_google, "gelu"),
    "gelu tanh written out": (gelu_new, "gelu_tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_after_a_linear(name: str, rewrite: Callable[..., Any]) -> None:
    spelling, activation = ACTIVATIONS[name]
    found = rewrite(lambda x, w, b: spelling(F.linear(x, w, b)), normal(2, 5, 24), normal(16, 24), normal(16))
    assert found.ops == Counter(linear=1)
    assert found.calls[0][3] == activation
    assert set(found.targets) == {torch.ops.burnish.linear.default}


def other_constant(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.04 * torch.pow(x, 3.0))))


def other_half(x: Tensor) -> Tensor:
    return x * 0.6 * (1.0 + torch.erf(x / math.sqrt(2.0)))


@pytest.mark.parametrize("near", [other_constant, other_half, torch.sigmoid, F.elu])
def test_what_is_no_known_activation(near: Callable[..., Tensor], rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x, w: near(F.linear(x, w)), normal(2, 5, 24), normal(16, 24))
    assert found.ops == Counter(linear=1)
    assert found.calls[0][3] == "none"
    assert len(found.targets) > 1


def test_a_product_that_others_need_keeps_no_activation(rewrite: Callable[..., Any]) -> None:
    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        product = F.linear(x, w)
        return F.relu(product), product + 1

    found = rewrite(both, normal(2, 5, 24), normal(16, 24))
    assert found.calls[0][3] == "none"
    assert "is also used by add" in found.reasons


def test_conv1d_of_transformers(rewrite: Callable[..., Any]) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    found = rewrite(pytorch_utils.Conv1D(16, 24), normal(2, 5, 24))
    assert found.ops == Counter(linear=1)
    x, weight, bias, activation, residual = found.calls[0]
    assert weight.target is aten.t.default
    assert x.op == "placeholder"
    assert (bias.op, activation, residual) == ("get_attr", "none", None)


def test_addmm_of_matrices(rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x, w, b: torch.addmm(b, x, w), normal(5, 24), normal(24, 16), normal(16))
    assert found.ops == Counter(linear=1)


@pytest.mark.parametrize("factors", [{"alpha": 2}, {"beta": 0.5}])
def test_scaled_addmm_stays(factors: dict[str, float], rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x, w, b: torch.addmm(b, x, w, **factors), normal(5, 24), normal(24, 16), normal(16))
    assert not found.ops
    assert "alpha or beta is not 1" in found.reasons


def test_addmm_of_a_full_matrix_stays(rewrite: Callable[..., Any]) -> None:
    """What is added is no bias: it differs from row to row."""
    found = rewrite(lambda x, w, b: torch.addmm(b, x, w), normal(5, 24), normal(24, 16), normal(5, 16))
    assert not found.ops
    assert "bias has shape" in found.reasons
    assert set(found.targets) == {aten.addmm.default}


def test_a_linear_that_the_op_refuses_stays(rewrite: Callable[..., Any]) -> None:
    """torch takes a bias for each row and weights that are vectors; integers too."""
    for inputs in ((normal(5, 24), normal(16, 24), normal(5, 16)), (normal(2, 5, 24), normal(24))):
        found = rewrite(F.linear, *inputs)
        assert not found.ops
        assert set(found.targets) == {aten.linear.default}
    found = rewrite(F.linear, torch.ones(5, 24, dtype=torch.int64), torch.ones(16, 24, dtype=torch.int64))
    assert not found.ops
    assert "x has dtype torch.int64" in found.reasons


def test_linears_without_bias_and_of_one_row(rewrite: Callable[..., Any]) -> None:
    found = rewrite(nn.Sequential(nn.Linear(24, 16, bias=False), nn.Linear(16, 8)), normal(24))
    assert found.ops == Counter(linear=2)
    assert [call[2] is None for call in found.calls] == [True, False]
