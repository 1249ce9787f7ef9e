"""The product that rotates and appends: against linear and what follows apart, in place, what it refuses, reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Cost
from burnish.ops import append_kv, linear, linear_rope_append, rope_append
from tests.ops.matrix import DTYPES, assert_impls
from tests.ops.test_append import copied
from tests.ops.test_rope import tables

LENGTHS = pytest.mark.parametrize("lengths", [torch.tensor(3), torch.tensor([7, 10], dtype=torch.int32)])


def inputs(s: int = 3, d: int = 8, dv: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias and the caches: 4 heads of q, 2 of k and v."""
    rows = 4 * d + 2 * (d + dv)
    weight, bias = randn(rows, 24, dtype=dtype, seed=1) / 24**0.5, randn(rows, dtype=dtype, seed=2)
    caches = (randn(2, 2, 12, width, dtype=dtype, seed=width) for width in (d, dv))
    return randn(2, s, 24, dtype=dtype), weight, bias, *caches


def apart(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """As a model has it before: a product, its parts as heads, rotated and appended."""
    d, dv = k_cache.shape[3], v_cache.shape[3]
    parts = linear.reference(x, weight, bias).split([4 * d, 2 * d, 2 * dv], dim=-1)
    heads = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip(parts, (4, 2, 2), strict=True))
    return rope_append.reference(*heads, cos, sin, k_cache, v_cache, *rest)


@LENGTHS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_a_product_and_rope_append_of_its_parts(dtype: torch.dtype, interleaved: bool, lengths: Tensor) -> None:
    x, weight, bias, *caches = inputs(dtype=dtype)
    for width, added in ((8, bias), (6, None)):
        given = (t.to(dtype) for t in tables(3, width, interleaved, start=3))
        args: tuple[Any, ...] = x, weight, added, *given, *caches, lengths, interleaved
        assert assert_impls(linear_rope_append, *args) == ["torch", "reference"]
        for one, other in zip(linear_rope_append.reference(*args), apart(*args), strict=True):
            assert torch.equal(one, other)


@LENGTHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_tables_it_is_a_product_and_append_kv_of_its_parts(dtype: torch.dtype, lengths: Tensor) -> None:
    x, weight, bias, k_cache, v_cache = inputs(dtype=dtype)
    args = x, weight, bias, None, None, k_cache, v_cache, lengths
    assert assert_impls(linear_rope_append, *args) == ["torch", "reference"]
    q, *caches = linear_rope_append.reference(*args)
    parts = linear.reference(x, weight, bias).split([32, 16, 12], dim=-1)
    expected_q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip(parts, (4, 2, 2), strict=True))
    for one, other in zip(
        (q, *caches), (expected_q, *append_kv.reference(k_cache, v_cache, k, v, lengths)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rotated", [True, False])
def test_layouts(rotated: bool) -> None:
    x, weight, bias, *caches = inputs()
    given_tables = tables(3, 8) if rotated else (None, None)
    rest = *given_tables, *(cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches), torch.tensor(2)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(2, 3, 24)):
        assert_impls(linear_rope_append, given, weight.t().contiguous().t(), bias, *rest)


@pytest.mark.parametrize(
    "sample", list(linear_rope_append.samples("cpu", torch.bfloat16)), ids=lambda sample: sample.label
)
def test_in_place_is_the_same_in_the_given_memory(sample: Any) -> None:
    impl, bound = linear_rope_append.impls["torch"], linear_rope_append.bind(*sample.args)
    if impl.why_not(*bound):
        return
    args = copied(bound)
    assert impl.in_place is not None
    results = impl.in_place(*args)
    assert results[1] is args[5]
    assert results[2] is args[6]
    for result, other in zip(results, impl.fn(*bound), strict=True):
        assert torch.equal(result, other)
    for i, before in enumerate(bound):
        if isinstance(before, Tensor) and i not in linear_rope_append.donates:
            assert torch.equal(args[i], before)


def test_the_cost_is_the_products_and_the_rotations() -> None:
    x, weight, bias, *caches = inputs()
    cos, sin = tables(3, 8)
    product, turned = linear.cost(x, weight, bias), 3 * torch.empty(2, 6, 3, 8).numel()
    args = x, weight, bias, cos, sin, *caches, torch.tensor(3)
    assert linear_rope_append.cost(*args) == Cost(product.flops + turned, product.bytes + 2 * 3 * 8 * 4 + 8)
    args = x, weight, bias, None, None, *caches, torch.tensor(3)
    assert linear_rope_append.cost(*args) == Cost(product.flops, product.bytes + 8)


def test_fake_tensors_need_no_length() -> None:
    sample = next(iter(linear_rope_append.samples("cpu", torch.bfloat16)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample.args]
        for fn in (linear_rope_append, linear_rope_append.reference, linear_rope_append.shape):
            q, *caches = fn(*linear_rope_append.bind(*fake))
            assert q.shape == (1, 4, 1, 32)
            assert [cache.shape for cache in caches] == [a.shape for a in fake[5:7]]


def test_tables_of_another_dtype_are_refused_by_torch_and_right_by_the_op() -> None:
    x, weight, bias, *caches = inputs(dtype=torch.bfloat16)
    args = x, weight, bias, *tables(3, 8), *caches, torch.tensor(2)
    assert linear_rope_append.impls["torch"].why_not(*args)[0] == "cos is torch.float32 where x is torch.bfloat16"
    reference = linear_rope_append.reference
    assert_close(linear_rope_append(*args), reference(*args), oracle(reference, *args))


APART = ("torch_triton", "triton_skinny_apart", "triton_apart")


def test_reasons_against_what_runs_one_after_the_other() -> None:
    def reasons(name: str, x: Tensor, width: int | None = 8) -> list[str]:
        _, weight, bias, *caches = inputs(dtype=torch.bfloat16)
        given = (None, None) if width is None else tables(x.shape[1], width)
        args = x, weight, bias, *given, *caches, torch.tensor(2)
        return [r for r in linear_rope_append.impls[name].why_not(*args) if "CUDA" not in r]

    few, many = (randn(2, s, 24, dtype=torch.bfloat16) for s in (3, 40))
    for name in APART:
        assert reasons(name, few) == reasons(name, few, 4) == reasons(name, few, None) == []
        assert reasons(name, few, 0) == ["cos and sin have no columns: nothing is rotated"]
    assert reasons("torch_triton", many) == reasons("torch_triton", many, None) == []
    assert reasons("triton_skinny_apart", many) == ["x has 80 rows; the kernel takes 2 to 64"]
    assert reasons("triton_apart", many) == ["x has 80 rows; the kernel takes up to 8"]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("rotated", [True, False])
def test_what_runs_one_after_the_other(name: str, rotated: bool) -> None:
    """By the interpreter."""
    pytest.importorskip("triton")
    x, weight, bias, *caches = inputs(dtype=torch.float16)
    args = x, weight, bias, *(tables(3, 8) if rotated else (None, None)), *caches, torch.tensor([9, 2])
    results = linear_rope_append.impls[name].fn(*args)
    assert_close(results, linear_rope_append.reference(*args), oracle(linear_rope_append.reference, *args))
    assert results[0].transpose(1, 2).is_contiguous()


X, W, T, C, ONE = torch.ones(2, 4, 3), torch.ones(32, 3), torch.ones(4, 8), torch.ones(2, 1, 9, 8), torch.tensor(1)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((X[0], W, None, T, T, C, C, ONE), ValueError, r"x has shape \(4, 3\); it must be \(batch, sequence, K\)"),
        ((X, W[:, :2], None, T, T, C, C, ONE), ValueError, r"weight has shape \(32, 2\)"),
        ((X, W, W[1:, 0], T, T, C, C, ONE), ValueError, r"bias has shape \(31,\)"),
        ((X, W.double(), None, T, T, C, C, ONE), TypeError, "weight has dtype torch.float64 where x has"),
        ((X, W, None, T, T, C[0], C, ONE), ValueError, r"k_cache has shape \(1, 9, 8\); it must be \(batch, heads"),
        ((X, W, None, T, T, C, C[0], ONE), ValueError, r"v_cache has shape \(1, 9, 8\); it must be \(batch, heads"),
        (
            (X, W[:16], None, T, T, C, C, ONE),
            ValueError,
            "weight has 16 rows; they must be heads of 8 for q, and 8 and 8",
        ),
        ((X, W[:28], None, T, T, C, C, ONE), ValueError, "weight has 28 rows; they must be heads of 8 for q"),
        ((X, W, None, T[1:], T[1:], C, C, ONE), ValueError, r"cos has shape \(3, 8\)"),
        ((X, W, None, T, None, C, C, ONE), ValueError, "sin is None where cos is given; give both tables, or neither"),
        ((X, W, None, None, T, C, C, ONE), ValueError, "cos is None where sin is given"),
        ((X, W, None, None, None, C[:1], C, ONE), ValueError, r"k_cache has shape \(1, 1, 9, 8\)"),
        ((X, W, None, T, T, C[:1], C, ONE), ValueError, r"k_cache has shape \(1, 1, 9, 8\)"),
        ((X, W, None, T, T, C, C[:, :, 1:], ONE), ValueError, "v_cache has 8 positions where k_cache has 9"),
        ((X, W, None, T, T, C, C, ONE.float()), TypeError, "lengths has dtype torch.float32"),
        ((X, W, None, T, T, C, C, ONE.expand(3)), ValueError, r"lengths has shape \(3,\)"),
        ((X, W, None, T, T, C.half(), C, ONE), TypeError, "k_cache has dtype torch.float16"),
    ],
)
def test_bad_input_is_named(args: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear_rope_append(*args)
