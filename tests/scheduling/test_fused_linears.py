"""Several Linears as one product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.numerics import assert_close
from burnish.scheduling import FusedLinears


@pytest.mark.parametrize("bias", [True, False])
def test_one_result_for_each(bias):
    linears = [nn.Linear(8, out, bias=bias) for out in (8, 4, 4)]
    fused = FusedLinears(*linears)
    assert fused.weight.shape == (16, 8)
    assert (fused.bias is None) is not bias
    x = torch.randn(2, 3, 8)
    expected = tuple(linear(x) for linear in linears)
    exact = tuple(linear.double()(x.double()) for linear in linears)
    assert_close(fused(x), expected, exact)


def test_the_linears_are_not_changed():
    linear = nn.Linear(4, 4)
    before = linear.weight.detach().clone()
    fused = FusedLinears(linear, nn.Linear(4, 4))
    fused.weight.data.zero_()
    assert torch.equal(linear.weight, before)


def test_a_tail_for_each_result():
    fused = FusedLinears.with_tail(torch.relu).from_modules(nn.Linear(4, 4), nn.Linear(4, 2))
    assert all((part >= 0).all() for part in fused(torch.randn(8, 4)))
    with pytest.raises(TypeError, match="tail must be a function of one tensor, got int"):
        FusedLinears.with_tail(3)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((), "there are no Linears"),
        ((nn.Linear(4, 4), nn.ReLU()), "a ReLU cannot be merged, only Linears"),
        ((nn.Linear(4, 4), nn.Linear(8, 4)), "differ in in_features: 4, 8"),
        ((nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), "differ in whether they have a bias: True, False"),
        ((nn.Linear(4, 4), nn.Linear(4, 4).half()), "differ in dtype: torch.float32, torch.float16"),
        ((nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)), "differ in requires_grad"),
    ],
)
def test_what_cannot_be_merged(modules, message):
    with pytest.raises(ValueError, match=message):
        FusedLinears.from_modules(*modules)
