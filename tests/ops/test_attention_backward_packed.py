"""Attention's gradients side by side: every Impl of them, what is refused, and which choices hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import burnish
from burnish.numerics import randn
from burnish.op import ImplUnavailable
from burnish.ops import attention_backward, attention_backward_packed, attention_with_logsumexp
from tests.ops.matrix import DTYPES, assert_impls
from tests.ops.test_attention import padding, qkv


def backward(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    forward = attention_with_logsumexp.bind(q, k, v, **kwargs)
    out, logsumexp = attention_with_logsumexp.reference(*forward)
    return randn(*out.shape, dtype=q.dtype, seed=9), q, k, v, out, logsumexp, *forward[3:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"key_padding_mask": padding(2, 17)}])
def test_every_impl(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    for hq, hkv in ((4, 4), (6, 2)):
        args = backward(*qkv(2, hq, hkv, 17, 17, 16, dtype), **kwargs)
        assert {"torch_flash", "reference"} <= set(assert_impls(attention_backward_packed, *args))


def test_the_gradients_are_side_by_side() -> None:
    args = backward(*qkv(2, 6, 2, 17, 17, 16), is_causal=True)
    packed = attention_backward_packed(*args)
    assert packed.shape == (2, 17, 10, 16)
    for found, gradient in zip(packed.split([6, 2, 2], dim=2), attention_backward(*args)[:3], strict=True):
        assert torch.equal(found, gradient.transpose(1, 2))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="k has 9 keys; side by side with q's gradient there must be q's 7"):
        attention_backward_packed(*backward(*qkv(lq=7, lk=9)))
    q, k, v = qkv(lq=7, lk=7, d=16)
    with pytest.raises(ValueError, match="v has head_dim 8; side by side with q's gradient it must be q's 16"):
        attention_backward_packed(*backward(q, k, v[..., :8]))
    with pytest.raises(ValueError, match="logsumexp is"):
        attention_backward_packed(q, q, k, v, q, q)


def test_the_impls_are_those_of_the_gradients_apart() -> None:
    assert list(attention_backward_packed.impls) == list(attention_backward.impls)
    for name, impl in attention_backward.impls.items():
        packed = attention_backward_packed.impls[name]
        assert packed.named_only == impl.named_only
        args = backward(*qkv(lq=7, lk=7), window=3)
        assert packed.why_not(*args) == impl.why_not(*args)


@pytest.mark.parametrize("name", ["attention", "attention_backward", "attention_backward_packed"])
def test_choices_for_attention_hold(name: str) -> None:
    args = backward(*qkv(lq=7, lk=7))
    with burnish.use(**{name: "torch_efficient"}), pytest.raises(ImplUnavailable, match="the inputs are on cpu"):
        attention_backward_packed(*args)
    with burnish.use(**{name: "reference"}):
        assert attention_backward_packed.select(*args).name == "reference"


def test_the_nearest_choice_goes_first() -> None:
    args = backward(*qkv(lq=7, lk=7))
    with burnish.use(attention="torch_efficient", attention_backward="reference"):
        assert attention_backward_packed.select(*args).name == "reference"
    with burnish.use(attention="torch_sdpa"), pytest.raises(ImplUnavailable, match="has no such Impl") as raised:
        attention_backward_packed.select(*args)
    assert raised.value.op == "attention"
