"""A run in float64 gets the random numbers of the model's own dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.numerics import assert_close
from burnish.scheduling.randomness import Draws, Float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.3, training=True),
        lambda x: torch.native_dropout(x, 0.3, True)[0],
        lambda x: x * torch.rand_like(x),
        lambda x: x + torch.randn(x.shape, dtype=x.dtype),
        lambda x: x * torch.empty_like(x).uniform_(),
    ],
)
def test_the_same_numbers_in_float64(function, dtype):
    x = torch.randn(64, 8).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    with Draws() as narrow:
        torch.manual_seed(0)
        y = function(x)
    with Float64(dtype) as exact:
        torch.manual_seed(0)
        true = function(wide)
        (gradient,) = torch.autograd.grad(true.sum(), wide)
    assert true.dtype is torch.float64
    assert_close(y.detach(), true.detach().to(dtype), true.detach())
    assert torch.equal(gradient != 0, torch.autograd.grad(y.sum(), x)[0] != 0)
    assert narrow.draws == exact.draws
    assert len(narrow.draws) == 1


def test_what_a_model_casts_down_stays_in_float64():
    x = torch.randn(4, 6, dtype=torch.float64)
    with Float64(torch.bfloat16):
        assert (x.to(torch.float32) * 2).dtype is torch.float64
        assert x.t().contiguous().t().reshape(-1).dtype is torch.float64


def test_attention_without_dropout_draws_nothing():
    q = torch.randn(1, 2, 4, 8)
    for p, count in ((0.0, 0), (0.5, 1)):
        with Draws() as recorded:
            F.scaled_dot_product_attention(q, q, q, dropout_p=p)
        assert len(recorded.draws) == count
