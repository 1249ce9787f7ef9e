"""The quantized product that rotates and appends: against `linear_rope_append` of the dequantized weight, in place,
reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Sample
from burnish.ops import linear_rope_append, quantized_linear, quantized_linear_rope_append
from burnish.ops._quantized import operands_of
from burnish.quantize import Kind, dequantize
from tests.ops.matrix import assert_impls
from tests.ops.test_append import copied
from tests.ops.test_rope import tables

KINDS = pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
SAMPLES = pytest.mark.parametrize(
    "sample", list(quantized_linear_rope_append.samples("cpu", torch.float32)), ids=lambda sample: sample.label
)


def inputs(kind: Kind, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """All up to the bias, and the caches: 4 heads of q, 2 of k and v."""
    weight = operands_of(torch.device("cpu"), 64, 128, 1, kind, **options)
    caches = (randn(2, 2, 12, 8, dtype=dtype, seed=seed) for seed in (3, 4))
    return [randn(2, 3, 128, dtype=dtype), *weight, randn(64, dtype=dtype, seed=2), *caches]


@KINDS
@pytest.mark.parametrize("rotated", [True, False])
def test_it_is_the_product_of_the_dequantized_weight(kind: Kind, rotated: bool) -> None:
    x, *weight, bias, k_cache, v_cache = inputs(kind)
    rest = *(tables(3, 8) if rotated else (None, None)), k_cache, v_cache, torch.tensor([7, 10])
    args = x, *weight, bias, *rest
    assert assert_impls(quantized_linear_rope_append, *args) == ["torch", "reference"]
    expected = linear_rope_append.reference(x, dequantize(*weight, torch.float32), bias, *rest)
    for one, other in zip(quantized_linear_rope_append.reference(*args), expected, strict=True):
        assert torch.equal(one, other)


@SAMPLES
def test_in_place_is_the_same_in_the_given_memory(sample: Sample) -> None:
    impl, bound = quantized_linear_rope_append.impls["torch"], quantized_linear_rope_append.bind(*sample.args)
    args = copied(bound)
    assert impl.in_place is not None
    results = impl.in_place(*args)
    assert results[1] is args[8]
    assert results[2] is args[9]
    for result, other in zip(results, impl.fn(*bound), strict=True):
        assert torch.equal(result, other)
    for i, before in enumerate(bound):
        if isinstance(before, torch.Tensor) and i not in quantized_linear_rope_append.donates:
            assert torch.equal(args[i], before)


def test_the_weight_dequantized_by_a_kernel() -> None:
    """By the interpreter."""
    pytest.importorskip("triton")
    x, *weight, bias, k_cache, v_cache = inputs("int4", torch.float16, group_size=32, symmetric=False)
    args = x, *weight, bias, None, None, k_cache, v_cache, torch.tensor(2)
    reference, results = quantized_linear_rope_append.reference, quantized_linear_rope_append.impls["triton_dequantize"]
    assert_close(results.fn(*args), reference(*args), oracle(reference, *args))


def test_reasons() -> None:
    def reasons(name: str, args: list[Any], width: int = 8) -> list[str]:
        x, *weight, bias, k_cache, v_cache = args
        bound = x, *weight, bias, *tables(x.shape[1], width), k_cache, v_cache, torch.tensor(2)
        found = quantized_linear_rope_append.impls[name].why_not(*quantized_linear_rope_append.bind(*bound))
        return [reason for reason in found if "CUDA" not in reason]

    half = inputs("int4", torch.float16)
    assert reasons("gluon_gemv", half) == reasons("gluon_apart", half) == reasons("gluon_apart", half, 4) == []
    assert reasons("gluon_gemv", half, 4) == ["cos and sin have 4 columns; the kernel rotates whole heads, of 8"]
    odd = inputs("int4", torch.float16, symmetric=False)
    why = ["there are zeros, which the kernel does not subtract"]
    assert reasons("gluon_gemv", odd) == reasons("gluon_apart", odd) == why
    assert reasons("torch_triton", odd) == reasons("triton_dequantize", odd) == []


def test_bad_input_is_named() -> None:
    x, *weight, bias, k_cache, v_cache = inputs("int8")
    rest = k_cache, v_cache, torch.tensor(2)
    with pytest.raises(ValueError, match="cos is None where sin is given; give both tables, or neither"):
        quantized_linear_rope_append(x, *weight, bias, None, tables(3, 8)[0], *rest)
    with pytest.raises(ValueError, match=r"x has shape \(3, 128\); it must be \(batch, sequence, K\)"):
        quantized_linear_rope_append(x[0], *weight, bias, None, None, *rest)
    with pytest.raises(
        ValueError, match="weight has 64 rows; they must be heads of 8 for q, and 32 and 32 for k and v"
    ):
        quantized_linear_rope_append(x, *weight, bias, None, None, *(c.repeat(1, 2, 1, 1) for c in rest[:2]), rest[2])
    with pytest.raises(ValueError, match="kind is 'int3'; it must be one of"):
        quantized_linear_rope_append(x, *weight[:3], "int3", bias, None, None, *rest)


def test_the_cost_reads_what_is_stored() -> None:
    x, *weight, bias, k_cache, v_cache = inputs("int4")
    args = x, *weight, bias, None, None, k_cache, v_cache, torch.tensor(2)
    product = quantized_linear.cost(x, *weight, bias)
    found = quantized_linear_rope_append.cost(*args)
    assert (found.flops, found.bytes) == (product.flops, product.bytes + 8)
