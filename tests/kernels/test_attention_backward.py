"""Attention's backward kernels in Triton's interpreter, and the forward one with logsumexp and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import attention_backward, attention_with_logsumexp
from burnish.ops._dropout import kept_weights, philox, threshold_of
from tests.slow import slow

pytest.importorskip("triton")

import triton
import triton.language as tl

from burnish.kernels.attention_backward_configs import BackwardConfig, backward_configs_for
from burnish.kernels.attention_dropout import kept_weights as kept_in_kernel
from burnish.kernels.launch import Config, Target, recording
from tests.kernels.test_attention import padding, qkv

SEED = torch.tensor([-(1 << 61) - 12345])


def blocks(keys: tuple[int, int], queries: tuple[int, int], tma: int = 0) -> BackwardConfig:
    of = (Config.of(4, 1, BLOCK_M=m, BLOCK_N=n, TMA=tma) for m, n in (keys, queries))
    return BackwardConfig(*of, Config.of(4, 1, BLOCK_M=16, BLOCK_N=32))


SMALL = blocks((16, 32), (32, 16))


def run(op: Op, bound: tuple[Any, ...], config: Any) -> Any:
    reasons = op.impls["triton"].why_not(*bound)
    assert all("not on a CUDA device" in reason for reason in reasons), reasons
    versions = [a._version for a in bound if isinstance(a, Tensor)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result = op.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, op.reference(*bound), oracle(op.reference, *bound))
    assert versions == [a._version for a in bound if isinstance(a, Tensor)]
    return result


def check(*args: Any, config: Any = SMALL, grad: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
    """Both passes' results, once they are found right: numbers, layout in memory, inputs left alone."""
    forward = attention_with_logsumexp.bind(*args, **kwargs)
    run(attention_with_logsumexp, forward, None)
    out, logsumexp = attention_with_logsumexp.reference(*forward)
    grad = randn(*out.shape, dtype=out.dtype, seed=9) if grad is None else grad.expand(out.shape)
    bias = forward[3]
    backward = grad, *forward[:3], out, logsumexp, *forward[3:], bias is not None and bias.dtype != torch.bool
    result: tuple[Tensor, ...] = run(attention_backward, backward, config)
    assert all(t.transpose(1, 2).is_contiguous() for t in result[:3])
    return result


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("s", [1, 16, 33, 64, slow(130)])
def test_lengths(s: int, is_causal: bool) -> None:
    check(*qkv(lq=s, lk=s, d=16), is_causal=is_causal)
    check(*qkv(2, lq=s, lk=s, d=16, dtype=torch.bfloat16), None, padding(2, s), is_causal, config=None)


@pytest.mark.parametrize("d", [16, 20, 80, 96, slow(128), slow(256)])
def test_head_dims(d: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if dtype != torch.float32 or d <= 128:
            check(*qkv(lq=9, lk=40, d=d, dtype=dtype), config=None)


def test_wider_heads_are_refused() -> None:
    for d, dtype in ((264, torch.float16), (136, torch.float32)):
        q, k, v = qkv(lq=5, lk=5, d=d, dtype=dtype)
        why_not = attention_backward.impls["triton"].why_not(q, q, k, v, q, q[..., 0].float())
        assert f"head_dim {d} is above {136 - 8 if dtype == torch.float32 else 256}" in why_not[-1]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [slow(1), 5, 40, slow(2**40)])
@pytest.mark.parametrize(("lq", "lk"), [slow(70, 70), (20, 90), (60, 24)])
def test_windows_and_other_numbers_of_queries(lq: int, lk: int, window: int, is_causal: bool) -> None:
    check(*qkv(lq=lq, lk=lk, d=16), is_causal=is_causal, window=window)


@pytest.mark.parametrize(("lq", "lk"), [(1, 130), (33, 100), (33, 7), (100, 33)])
def test_causality_is_aligned_at_the_last_key(lq: int, lk: int) -> None:
    check(*qkv(lq=lq, lk=lk, d=16), is_causal=True)
    check(*qkv(lq=lq, lk=lk, d=16))


@pytest.mark.parametrize(("hq", "hkv"), [slow(8, 2), (4, 1), (6, 3)])
def test_grouped_heads(hq: int, hkv: int) -> None:
    check(*qkv(2, hq, hkv, 17, 40, 16), None, padding(2, 40).flip(1), True)
    check(*qkv(2, hq, hkv, 17, 40, 16), randn(2, hq, 1, 40, seed=4) > -1)


BIASES = [(2, 4, 20, 40), (2, 1, 1, 40), (20, 1), *map(slow, ((4, 20, 40), (1,), (1, 4, 1, 1), (2, 1, 20, 40)))]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_biases_and_their_gradients(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(2, 4, 2, 20, 40, 16)
    dbias = check(q, k, v, randn(*shape, seed=5).half())[3]
    assert dbias.shape == shape
    assert dbias.is_contiguous()
    check(q, k, v, randn(*shape, seed=5), padding(2, 40).int(), True, 30, 0.3)
    check(q, k, v, randn(*shape, seed=5) > -0.5, padding(2, 40).flip(1))


def test_rows_without_keys_and_large_scores() -> None:
    q, k, v = qkv(2, lq=40, lk=20, dtype=torch.float32)
    dq = check(q, k, v, is_causal=True)[0]
    assert dq[:, :, :20].abs().max() == 0
    assert all(t.abs().max() == 0 for t in check(q, k, v, None, torch.zeros(2, 20, dtype=torch.bool))[:3])
    allowed = torch.ones(40, 20, dtype=torch.bool)
    allowed[7] = False
    for bias in (allowed, torch.zeros(40, 20).masked_fill(~allowed, -torch.inf)):
        assert check(q, k, v, bias)[0][:, :, 7].abs().max() == 0
    q, k, v = qkv(lq=20, lk=50, d=64)
    q, k = q / q.abs().max() * 120, k / k.abs().max() * 120  # the largest products are near 1e4
    for scale in (1.0, 0.0, -0.5):
        check(q, k, v, None, padding(1, 50), scale=scale)


def test_strides_of_every_kind() -> None:
    q, k, v = qkv(2, 4, 4, 17, 17, 16)
    check(*(t.contiguous() for t in (q, k, v)))
    check(*randn(2, 17, 4, 3, 16, dtype=torch.float16).permute(3, 0, 2, 1, 4).unbind(0))  # interleaved per head
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    check(q.flip(2), k[:, :1].expand_as(k), v[:, :, :1].expand_as(v))
    check(q, k, v, randn(2, 4, 17, 17, seed=5).half().transpose(2, 3), padding(17, 2).t())
    for grad in (torch.ones(1), randn(16, 17, seed=5).t()):
        check(q, k, v, grad=grad.half(), is_causal=True)


@pytest.mark.parametrize("tma", [1, 2])
def test_blocks_by_descriptor(tma: int) -> None:
    config = blocks((32, 64), (64, 32), tma)
    check(*qkv(2, 4, 2, 70, 130, 32), config=config)
    check(*qkv(2, 2, 2, 70, 70, 80), None, padding(2, 70), True, config=config)


def test_numbers_of_queries_by_descriptor() -> None:
    """Past the last query descriptors give zeros: with these weights are no zeros, and with large terms infinite."""
    config = blocks((32, 16), (16, 16), tma=2)
    for lq in (1, 33, 35):  # numbers that do not begin at multiples of 16 bytes in a tensor without gaps
        check(*qkv(2, 4, 2, lq, 40, 16), is_causal=True, window=20, config=config)
        check(*qkv(2, 4, 2, lq, 40, 16), 1e4 + randn(2, 1, 1, 40, seed=5), padding(2, 40), config=config)
        check(*qkv(2, 4, 2, lq, 40, 16), randn(2, 1, 1, 40, seed=5) > 0, config=config)
    check(*qkv(1, 2, 1, 33, 40, 16), randn(2, 33, 40, seed=5) * 100, dropout_p=0.3, seed=SEED, config=config)


@pytest.mark.parametrize("tma", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_that_see_no_key(dtype: torch.dtype, tma: int) -> None:
    """Whole blocks of queries before the first key: what they leave for the kernel of keys is finite."""
    config = blocks((16, 16), (16, 16), tma)
    dq, dk, dv = check(*qkv(2, 4, 2, 70, 20, 16, dtype), is_causal=True, config=config)[:3]
    assert dq[:, :, :50].abs().max() == 0
    assert all(t.isfinite().all() for t in (dk, dv))
    q, k, v = qkv(2, 4, 4, 24, 9, 16, dtype)
    check(q, k, torch.cat([v, v], dim=3), None, torch.zeros(2, 9, dtype=torch.bool), config=config)


def test_the_same_bits_at_every_run() -> None:
    q, k, v = qkv(2, 2, 1, 20, 40, 16)
    kwargs = {"bias": randn(1, 2, 20, 40, seed=5).half(), "dropout_p": 0.2, "seed": SEED}
    first, again = (check(q, k, v, **kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dropout_p", [slow(0.1), 0.7])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout(dropout_p: float, is_causal: bool) -> None:
    drop: dict[str, Any] = {"dropout_p": dropout_p, "seed": SEED}
    check(*qkv(2, 4, 2, 33, 47, 16), is_causal=is_causal, **drop)
    check(*qkv(2, 2, 2, 20, 40, 16, torch.bfloat16), randn(40, seed=3), padding(2, 40), is_causal, **drop, config=None)


@triton.jit
def _words(seed, out, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    words = tl.philox(tl.load(seed), places * 7, places + 3, 5, 0)
    for i in tl.static_range(4):
        tl.store(out + i * BLOCK + places, words[i].to(tl.int64))


@triton.jit
def _rand(seed, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.rand(tl.load(seed), tl.arange(0, BLOCK)))


@triton.jit
def _kept(seed, out, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    kept = kept_in_kernel(tl.load(seed), 3, 8, 16, threshold, BLOCK_M, BLOCK_N)
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + places, kept.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 7, 1 << 33, -5])
def test_random_words_are_tritons(seed: int) -> None:
    given, places = torch.tensor([seed]), torch.arange(64)
    found = torch.empty(4, 64, dtype=torch.int64)
    _words[(1,)](given, found, BLOCK=64)
    expected = philox(given, places * 7, places + 3, torch.tensor(5), torch.tensor(0))
    assert torch.equal(found & 0xFFFFFFFF, torch.stack(torch.broadcast_tensors(*expected)))
    uniform = torch.empty(64)
    _rand[(1,)](given, uniform, BLOCK=64)
    words = philox(given, places, *(torch.tensor(0),) * 3)[0].to(torch.int32)  # its bits, as a signed number
    assert torch.equal(uniform, torch.where(words < 0, -words - 1, words).float() * 4.6566127342e-10)


def test_kept_weights_are_the_references() -> None:
    found = torch.empty(16, 32, dtype=torch.int32)
    _kept[(1,)](SEED, found, threshold_of(0.3), BLOCK_M=16, BLOCK_N=32)
    assert torch.equal(found.bool(), kept_weights(SEED, 0.3, 1, 4, 24, 48)[0, 3, 8:, 16:])


def test_configs_are_distinct_and_there_are_some() -> None:
    for capability in ((8, 0), (9, 0), (10, 0)):
        for d, dtype in ((16, torch.float16), (64, torch.float32), (96, torch.bfloat16), (256, torch.bfloat16)):
            q = torch.empty(1, 64, 8, d, dtype=dtype, device="meta").transpose(1, 2)
            with recording(lambda launch: None, Target(capability, 132)):
                for bias, dropout in ((None, False), (torch.empty(64, 64, device="meta"), False), (None, True)):
                    configs = backward_configs_for(q, q, q, q, bias, dropout)
                    assert configs
                    assert len({str(config) for config in configs}) == len(configs)
