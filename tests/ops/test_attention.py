"""Attention by every Impl: shapes, masks, positions, grouped heads, strides, and rows that may attend to nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import attention
from burnish.ops._masks import allowed_pairs, attended_pairs
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def qkv(
    b: int = 2, hq: int = 2, hkv: int = 2, lq: int = 33, lk: int = 33, d: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (b, lq, hq, d), (b, lk, hkv, d), (b, lk, hkv, d)
    q, k, v = (randn(*shape, dtype=dtype, seed=i).transpose(1, 2) for i, shape in enumerate(shapes))
    return q, k, v


def padding(b: int, lk: int) -> Tensor:
    """Rows of which the first has one real token, the last all; a single row has two thirds."""
    lengths = torch.linspace(1, lk, b) if b > 1 else torch.tensor([(2 * lk + 2) // 3])
    return torch.arange(lk) < lengths.long()[:, None]


Kwargs = Callable[[int, int, torch.dtype], dict[str, Any]]
CASES: dict[str, Kwargs] = {
    "full": lambda b, s, dtype: {},
    "causal": lambda b, s, dtype: {"is_causal": True},
    "padding": lambda b, s, dtype: {"key_padding_mask": padding(b, s)},
    "causal padding": lambda b, s, dtype: {"is_causal": True, "key_padding_mask": padding(b, s).flip(1)},
    "bias": lambda b, s, dtype: {"bias": randn(b, 2, s, s, dtype=dtype, seed=5)},
    "broadcast bias": lambda b, s, dtype: {"bias": randn(1, 2, 1, s, dtype=dtype, seed=5)},
    "window": lambda b, s, dtype: {"is_causal": True, "window": 1 + s // 3},
}


@DTYPE
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 8), (8, 16), (2, 33), (1, 128), (1, 257)])
def test_lengths(b: int, s: int, case: str, dtype: torch.dtype) -> None:
    ran = assert_impls(attention, *qkv(b, lq=s, lk=s, dtype=dtype), **CASES[case](b, s, dtype))
    assert {"torch_flash", "torch_sdpa"} <= set(ran)


@DTYPE
@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 256])
def test_head_dims(d: int, dtype: torch.dtype) -> None:
    for case in ("full", "causal", "padding"):
        assert_impls(attention, *qkv(d=d, dtype=dtype), **CASES[case](2, 33, dtype))


@pytest.mark.parametrize("s", [384, 1024, 1500])
@pytest.mark.parametrize("case", ["full", "causal", "causal padding"])
def test_long_sequences(case: str, s: int) -> None:
    assert_impls(attention, *qkv(1, lq=s, lk=s, d=16), **CASES[case](1, s, torch.float32))


# Every batch, length and head_dim, and of the largest those that a CPU does in reasonable time.
SHAPES = [
    (b, s, d)
    for b in (1, 8, 32)
    for s in (1, 8, 16, 33, 64, 128, 257, 384, 1024, 1500)
    for d in (16, 32, 64, 80, 96, 128, 256)
    if b * s <= (4096 if d == 64 else 1024)
]


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("b", "s", "d"), SHAPES)
def test_the_whole_matrix(b: int, s: int, d: int, case: str, dtype: torch.dtype) -> None:
    assert_impls(attention, *qkv(b, lq=s, lk=s, d=d, dtype=dtype), **CASES[case](b, s, dtype))


@DTYPE
@pytest.mark.parametrize(("lq", "lk"), [(1, 1500), (1, 130), (7, 130), (33, 257), (5, 1500), (33, 7)])
def test_other_numbers_of_queries_than_keys(lq: int, lk: int, dtype: torch.dtype) -> None:
    for kwargs in ({}, {"is_causal": True}, {"window": 5, "is_causal": True}, {"key_padding_mask": padding(2, lk)}):
        assert_impls(attention, *qkv(lq=lq, lk=lk, d=16, dtype=dtype), **kwargs)


def test_causality_is_aligned_at_the_last_key() -> None:
    q, k, v = qkv(lq=8, lk=8)
    whole = attention(q, k, v, is_causal=True)
    for new in (1, 3):  # the last queries against all keys, as in a decode step with a cache
        last = attention(q[:, :, -new:], k, v, is_causal=True)
        assert_close(last, whole[:, :, -new:], oracle(attention.reference, q, k, v, is_causal=True)[:, :, -new:])


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.one_of(st.none(), st.integers(1, 12)), st.booleans())
def test_masks_against_a_double_loop(lq: int, lk: int, is_causal: bool, window: int | None, padded: bool) -> None:
    mask = padding(2, lk) if padded else None
    q, k = torch.empty(2, 1, lq, 1), torch.empty(2, 1, lk, 1)
    allowed = allowed_pairs(q, k, mask, is_causal, window)
    expected = torch.ones(2, 1, lq, lk, dtype=torch.bool)
    for b in range(2):
        for i in range(lq):
            for j in range(lk):
                distance = i + lk - lq - j
                expected[b, 0, i, j] = (
                    (not is_causal or distance >= 0)
                    and (window is None or abs(distance) < window)
                    and (mask is None or bool(mask[b, j]))
                )
    assert torch.equal(torch.ones_like(expected) if allowed is None else allowed.expand_as(expected), expected)
    if lq <= lk and not padded:
        assert attended_pairs(lq, lk, is_causal, window) == int(expected[0].sum())


@st.composite
def arguments(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    """Any arguments of attention that fit together, small."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    groups, hkv, b, lq, lk = one_of(1, 2, 4), one_of(1, 2), one_of(1, 2), one_of(1, 4, 9), one_of(1, 4, 9, 17)
    hq, dtype = groups * hkv, one_of(*dtypes)
    shape = (one_of(1, b), one_of(1, hq), one_of(1, lq), one_of(1, lk))
    number = randn(*shape, seed=6)
    return (
        *qkv(b, hq, hkv, lq, lk, 8, dtype),
        one_of(None, number.to(dtype), number > 0, number[0, 0]),
        one_of(None, padding(b, lk), padding(b, lk).flip(1).int()),
        one_of(False, True),
        one_of(None, 1, 3, 100),
        one_of(None, 0.1, 1.0),
    )


@settings(max_examples=40, deadline=None)
@given(arguments(DTYPES))
def test_any_combination_of_arguments(args: tuple[Any, ...]) -> None:
    assert_impls(attention, *args)


def one_query_at_a_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attention written again, as plainly as can be: each query gathers its keys."""
    (b, hq, lq, d), lk = q.shape, k.shape[2]
    out = torch.zeros(b, hq, lq, v.shape[3], dtype=q.dtype)
    bias = None if bias is None else bias.expand(b, hq, lq, lk)
    for row, head, i in itertools.product(range(b), range(hq), range(lq)):
        key_head, position = head // (hq // k.shape[1]), i + lk - lq
        keys = [
            j
            for j in range(lk)
            if (not is_causal or j <= position)
            and (window is None or abs(position - j) < window)
            and (mask is None or mask[row, j])
            and (bias is None or bias.dtype != torch.bool or bias[row, head, i, j])
        ]
        if keys:
            scores = k[row, key_head, keys] @ q[row, head, i] * (d**-0.5 if scale is None else scale)
            if bias is not None and bias.dtype != torch.bool:
                scores = scores + bias[row, head, i, keys]
            out[row, head, i] = torch.softmax(scores, 0) @ v[row, key_head, keys]
    return out


@settings(max_examples=40, deadline=None)
@given(arguments((torch.float32,)))
def test_the_reference_against_one_query_at_a_time(args: tuple[Any, ...]) -> None:
    assert_close(attention.reference(*args), one_query_at_a_time(*args), oracle(one_query_at_a_time, *args))


@DTYPE
@pytest.mark.parametrize(("hq", "hkv"), [(8, 2), (8, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize("lq", [1, 17])
def test_grouped_heads(lq: int, hq: int, hkv: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, hq, hkv, lq, 17, 16, dtype)
    bias = randn(2, hq, lq, 17, dtype=dtype, seed=5)
    mask = padding(2, 17).flip(1)
    for kwargs in ({}, {"is_causal": True}, {"bias": bias}, {"bias": bias[:1, :1]}, {"key_padding_mask": mask}):
        assert_impls(attention, q, k, v, **kwargs)
    repeated = (t.repeat_interleave(hq // hkv, 1) for t in (k, v))
    assert_close(attention(q, k, v), attention.reference(q, k, v), oracle(attention.reference, q, *repeated))


@DTYPE
def test_strides_of_every_kind(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 4, 17, 17, 16, dtype)
    packed = randn(2, 17, 4, 3, 16, dtype=dtype).permute(3, 0, 2, 1, 4)  # q, k and v interleaved per head
    assert_impls(attention, *packed.unbind(0))
    assert_impls(attention, q.contiguous(), k.contiguous(), v.contiguous())
    assert_impls(attention, q, k.transpose(2, 3).contiguous().transpose(2, 3), v)  # keys stored (D, L)
    assert_impls(attention, q.flip(2), k[:, :1].expand_as(k), v[:, :, :1].expand_as(v))
    assert_impls(attention, q[..., ::2], k[..., ::2], v[..., ::2])
    bias = randn(2, 4, 17, 17, dtype=dtype)
    assert_impls(attention, q, k, v, bias.transpose(2, 3))
    assert_impls(attention, q, k, v, bias[:, :, :1].expand(2, 4, 17, 17))
    assert_impls(attention, q, k, v, None, padding(17, 2).t())
    assert_impls(attention, q, k, v, None, padding(2, 17)[:1].expand(2, 17), True)


@DTYPE
@pytest.mark.parametrize("how", ["padding", "boolean bias", "infinite bias", "causal"])
def test_a_row_that_may_attend_to_nothing_gives_zeros(how: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(lq=9, lk=5, dtype=dtype)
    if how == "causal":
        kwargs, rows = {"is_causal": True}, (slice(None), slice(None), slice(0, 4))
    else:
        rows = (slice(0, 1),) * 3 if "bias" in how else (slice(0, 1),)  # type: ignore[assignment]
        allowed = torch.ones(2, 2, 9, 5, dtype=torch.bool)
        allowed[rows] = False
        kwargs = {
            "padding": {"key_padding_mask": allowed[:, 0, 0]},
            "boolean bias": {"bias": allowed},
            "infinite bias": {"bias": torch.zeros(2, 2, 9, 5).masked_fill(~allowed, -torch.inf)},
        }[how]
    bound = attention.bind(q, k, v, **kwargs)
    for name in assert_impls(attention, *bound):
        out = attention.impls[name].fn(*bound)
        assert out[rows].abs().max() == 0, name
        assert out.isfinite().all(), name
        inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
        attention.with_backward(name)(*inputs, *bound[3:]).square().sum().backward()
        for tensor in inputs:
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all(), name


@DTYPE
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype, d=64)
    q, k = q / q.abs().max() * 120, k / k.abs().max() * 120  # the largest products are near 1e4
    bias = torch.zeros(33, 33, dtype=dtype)
    bias[::2] = 1e4
    bias[:, ::3] = -1e4
    for kwargs in ({"scale": 1.0}, {"scale": 1.0, "bias": bias}):
        for name in assert_impls(attention, q, k, v, **kwargs):
            bound = attention.bind(q, k, v, **kwargs)
            assert attention.impls[name].fn(*bound).isfinite().all()


@DTYPE
def test_a_padded_batch_is_its_sequences_one_at_a_time(dtype: torch.dtype) -> None:
    q, k, v = qkv(3, 4, 2, 12, 12, 16, dtype)
    lengths = (1, 7, 12)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    together = attention(q, k, v, None, mask, True)
    for row, length in enumerate(lengths):
        alone = [t[row : row + 1, :, :length] for t in (q, k, v)]
        truth = oracle(attention.reference, *alone, is_causal=True)
        assert_close(together[row : row + 1, :, :length], attention.reference(*alone, is_causal=True), truth)


def test_it_agrees_with_torch() -> None:
    q, k, v = qkv()
    bias = randn(2, 2, 33, 33, seed=5)
    for kwargs, theirs in (({}, {}), ({"is_causal": True}, {"is_causal": True}), ({"bias": bias}, {"attn_mask": bias})):
        expected = F.scaled_dot_product_attention(q, k, v, **theirs)
        truth = oracle(F.scaled_dot_product_attention, q, k, v, **theirs)
        assert_close(attention(q, k, v, **kwargs), expected, truth)


def test_a_bias_can_be_learned() -> None:
    q, k, v = qkv()
    bias = randn(1, 2, 33, 33, seed=5).requires_grad_()
    for name in attention.impls:
        if not attention.impls[name].why_not(q, k, v, bias):
            (grad,) = torch.autograd.grad(attention.with_backward(name)(*attention.bind(q, k, v, bias)).sum(), bias)
            assert grad.shape == bias.shape, name
            assert grad.abs().max() > 0, name


def test_the_result_lies_heads_last_in_memory() -> None:
    assert attention(*qkv()).transpose(1, 2).is_contiguous()


def test_cost_counts_what_is_attended() -> None:
    q, k, v = qkv(1, 4, 2, 8, 8, 16)
    full, causal = attention.cost(q, k, v), attention.cost(q, k, v, is_causal=True)
    assert full.flops == 4 * 4 * 8 * 8 * 16
    assert causal.flops == 4 * 4 * 36 * 16
    assert full.bytes == 4 * (2 * 4 + 2 * 2) * 8 * 16
    assert attention.cost(q, k, v, is_causal=True, window=1).flops == 4 * 4 * 8 * 16


Q, K, M = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 7, 8), torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "says"),
    [
        ((Q[0], K, K), {}, ValueError, r"q has shape \(4, 5, 8\)"),
        ((Q, K[:1], K), {}, ValueError, r"k has shape \(1, 2, 7, 8\)"),
        ((Q, K[..., :4], K), {}, ValueError, r"k has shape \(2, 2, 7, 4\)"),
        ((Q[:, :3], K, K), {}, ValueError, "number of heads that divides q's"),
        ((Q, K, K[:, :, :5]), {}, ValueError, r"v has shape \(2, 2, 5, 8\)"),
        ((Q, K.half(), K), {}, TypeError, "k has dtype torch.float16 where q has torch.float32"),
        (
            (Q, K, K, torch.ones(5, 6)),
            {},
            ValueError,
            r"bias has shape \(5, 6\); it must broadcast to .*\(2, 4, 5, 7\)",
        ),
        ((Q, K, K, torch.ones(5, 7).int()), {}, TypeError, "bias has dtype torch.int32"),
        ((Q, K, K, None, M[:, :5]), {}, ValueError, r"key_padding_mask has shape \(2, 5\)"),
        ((Q, K, K, None, M.float()), {}, TypeError, "an additive mask goes to bias"),
        ((Q, K, K), {"window": 0}, ValueError, "window is 0"),
    ],
)
def test_bad_input_is_named(args: tuple[Tensor, ...], kwargs: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attention(*args, **kwargs)
