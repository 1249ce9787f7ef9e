"""Attention's backward kernels in Triton's interpreter, where they write all three gradients into one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.numerics import randn
from burnish.ops import attention_backward, attention_backward_packed, attention_with_logsumexp

pytest.importorskip("triton")

from tests.kernels.test_attention import padding, qkv
from tests.kernels.test_attention_backward import SEED, SMALL, blocks, run


def check(*args: Any, config: Any = SMALL, **kwargs: Any) -> None:
    """The packed gradients are right, and bit for bit those that come apart."""
    forward = attention_with_logsumexp.bind(*args, **kwargs)
    out, logsumexp = attention_with_logsumexp.reference(*forward)
    backward = randn(*out.shape, dtype=out.dtype, seed=9), *forward[:3], out, logsumexp, *forward[3:]
    packed = run(attention_backward_packed, backward, config)
    assert packed.is_contiguous()
    apart = attention_backward.impls["triton"].fn(*backward, config=config)[:3]
    assert torch.equal(packed, torch.cat([t.transpose(1, 2) for t in apart], dim=2))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("s", [1, 33, 64])
def test_lengths(s: int, is_causal: bool) -> None:
    check(*qkv(2, lq=s, lk=s, d=16), is_causal=is_causal)
    check(*qkv(2, lq=s, lk=s, d=16, dtype=torch.bfloat16), is_causal=is_causal, config=None)


@pytest.mark.parametrize("d", [20, 64, 80])
def test_head_dims(d: int) -> None:
    for dtype in (torch.float16, torch.float32):
        check(*qkv(lq=33, lk=33, d=d, dtype=dtype), config=None)


@pytest.mark.parametrize(("hq", "hkv"), [(4, 1), (6, 3), (3, 3)])
def test_heads(hq: int, hkv: int) -> None:
    check(*qkv(2, hq, hkv, 40, 40, 16), None, padding(2, 40).flip(1), True)
    check(*qkv(2, hq, hkv, 40, 40, 16), is_causal=True, config=blocks((32, 64), (64, 32), tma=1))


def test_masks_and_dropout() -> None:
    check(*qkv(2, 4, 2, 40, 40, 16), randn(2, 1, 40, 40, seed=5), is_causal=True, window=9, scale=0.3)
    check(*qkv(2, 4, 2, 40, 40, 16), dropout_p=0.4, seed=SEED, is_causal=True)
