"""The kernels of packed sequences in Triton's interpreter: lengths, head dimensions, reaches, strides, both passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import varlen_attention, varlen_attention_backward, varlen_attention_with_logsumexp

pytest.importorskip("triton")

from burnish.kernels.launch import Config, Launch, recording
from tests.slow import slow

LENGTHS = (5, 33, 0, 1, 70)
BLOCKS = [Config.of(4, 2, BLOCK_M=16, BLOCK_N=32), Config.of(4, 2, BLOCK_M=64, BLOCK_N=16)]


def offsets(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def qkv(
    tokens: int, hq: int = 2, hkv: int = 1, d: int = 16, keys: int | None = None, dtype: Any = torch.bfloat16
) -> Any:
    keys = tokens if keys is None else keys
    return tuple(
        randn(n, h, d, dtype=dtype, seed=s) for s, (n, h) in enumerate(((tokens, hq), (keys, hkv), (keys, hkv)))
    )


def check(op: Op, *args: Any, config: Config | None = None) -> Any:
    bound = op.bind(*args)
    reasons = op.impls["triton"].why_not(*bound)
    assert all("not on a CUDA device" in reason for reason in reasons), reasons
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result = op.impls["triton"].fn(*bound, config=config)
        again = op.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, op.reference(*bound), oracle(op.reference, *bound))
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, again)), strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
    return result


def check_all(*args: Any, config: Config | None = None) -> None:
    """The forward pass with and without logsumexp, and the backward pass."""
    out = check(varlen_attention, *args, config=config)
    with_sums, sums = check(varlen_attention_with_logsumexp, *args, config=config)
    assert torch.equal(out, with_sums)
    grad = randn(*out.shape, dtype=out.dtype, seed=7)
    check(varlen_attention_backward, grad, *args[:3], out, sums, *args[3:], config=config)


@pytest.mark.parametrize("config", [None, *BLOCKS], ids=str)
@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (True, 9), (False, 9)])
def test_reaches(is_causal: bool, window: int | None, config: Config | None) -> None:
    cu = offsets(*LENGTHS)
    check_all(*qkv(int(cu[-1])), cu, None, 70, None, is_causal, window, config=config)


@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), slow(True, 9), slow(False, 9)])
def test_other_keys_than_queries(is_causal: bool, window: int | None) -> None:
    cu_q, cu_k = offsets(5, 40, 3, 0, 19, 7), offsets(9, 17, 0, 4, 60, 7)
    args = qkv(int(cu_q[-1]), keys=int(cu_k[-1]))
    check_all(*args, cu_q.long(), cu_k.long(), 40, 60, is_causal, window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [20, 64, slow(96), 128, slow(256)])
def test_head_dims(d: int, dtype: torch.dtype) -> None:
    cu = offsets(7, 20)
    check_all(*qkv(27, d=d, dtype=dtype), cu, None, 20)


def test_strides_and_wide_v() -> None:
    cu = offsets(7, 20)
    joined = randn(27, 3, 2, 32, dtype=torch.float16).unbind(1)
    check_all(*joined, cu, None, 20, None, True)
    q, k, v = qkv(27)
    check_all(q, k, randn(27, 1, 48, dtype=torch.bfloat16), cu)
    check_all(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cu)


def test_scales_that_are_not_positive() -> None:
    check_all(*qkv(27), offsets(7, 20), None, 20, None, False, None, -0.5)


def test_only_bounds_decide_how_many_programs_there_are() -> None:
    """Not the offsets, which only the device knows."""
    seen: list[Launch] = []
    args = qkv(100)
    with recording(seen.append):
        for cu in (offsets(50, 50), offsets(1, 99), offsets(0, 100)):
            varlen_attention.impls["triton"].fn(*args, cu, None, 100, config=BLOCKS[0])
    assert {launch.grid for launch in seen} == {(7 * 2, 2)}
