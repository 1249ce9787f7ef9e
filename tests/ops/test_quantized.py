"""The products of quantized weights: every Impl, refusals, reasons, costs, gradients, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Cost, use
from burnish.ops import quantized_gated_product, quantized_linear
from burnish.ops._activations import ACTIVATIONS, GATES
from burnish.quantize import KINDS, Kind, quantize_weight
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KIND = pytest.mark.parametrize("kind", KINDS)


def weight(n: int, k: int, kind: Kind, **options: Any) -> tuple[Tensor, Tensor, Tensor | None, str]:
    quantized = quantize_weight(randn(n, k, seed=1) / k**0.5, kind, **options)
    return quantized.data, quantized.scales, quantized.zeros, quantized.kind


@DTYPE
@KIND
@pytest.mark.parametrize("m", [1, 2, 16, 33])
def test_rows(m: int, kind: Kind, dtype: torch.dtype) -> None:
    x, bias = randn(m, 256, dtype=dtype), randn(40, dtype=dtype, seed=2)
    stored = weight(40, 256, kind, scale_dtype=dtype)
    residual = randn(m, 40, dtype=dtype, seed=3)
    assert "torch" in assert_impls(quantized_linear, x, *stored)
    assert "torch" in assert_impls(quantized_linear, x, *stored, bias, "gelu", residual)
    assert "torch" in assert_impls(quantized_gated_product, x, *stored, bias)


@DTYPE
def test_every_epilogue(dtype: torch.dtype) -> None:
    x, stored = randn(2, 3, 128, dtype=dtype), weight(48, 128, "int4", symmetric=False, group_size=32)
    bias, residual = randn(48, dtype=dtype, seed=2), randn(2, 3, 48, dtype=dtype, seed=3)
    for activation in ACTIVATIONS:
        assert_impls(quantized_linear, x, *stored, bias, activation, residual)
    for activation in GATES:
        assert_impls(quantized_gated_product, x, *stored, bias, activation)


@KIND
def test_it_is_a_linear_by_the_dequantized_weight(kind: Kind) -> None:
    wide = randn(24, 256, seed=1) / 16
    quantized = quantize_weight(wide, kind)
    x = randn(5, 256)
    result = quantized_linear(x, quantized.data, quantized.scales, quantized.zeros, kind)
    again = quantized.dequantize()
    assert_close(result, F.linear(x, again), oracle(F.linear, x, again))
    gated = quantized_gated_product(x, quantized.data, quantized.scales, quantized.zeros, kind)

    def plainly(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_close(gated, plainly(x, again), oracle(plainly, x, again))
    assert not torch.equal(again, wide)


@KIND
def test_gradients_reach_x(kind: Kind) -> None:
    stored = weight(8, 128, kind)
    x = randn(3, 128).requires_grad_()
    quantized_linear(x, *stored, None, "silu").square().sum().backward()
    other = x.detach().clone().requires_grad_()
    dense = quantize_weight(randn(8, 128, seed=1) / 128**0.5, kind).dequantize()
    F.silu(F.linear(other, dense)).square().sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)


@KIND
def test_it_is_one_node_in_an_export(kind: Kind) -> None:
    stored = weight(8, 128, kind)

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in zip(("data", "scales"), stored, strict=False):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = quantized_linear(x, self.data, self.scales, None, kind)
            return out

    x = randn(2, 128)
    exported = torch.export.export(Product(), (x,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == ["burnish.quantized_linear.default"]
    assert torch.equal(exported.module()(x), quantized_linear(x, *stored))


def test_costs_count_what_is_stored() -> None:
    for kind, nbytes in (
        ("int8", 4096 * 512 + 4 * 512),
        ("fp8", 4096 * 512 + 4 * 512),
        ("int4", 2048 * 512 + 4 * 16384),
    ):
        quantized = quantize_weight(torch.randn(512, 4096), kind, search=False)  # type: ignore[arg-type]
        args = (torch.randn(1, 4096), quantized.data, quantized.scales, quantized.zeros, kind)
        assert quantized.nbytes == nbytes
        assert quantized_linear.cost(*args) == Cost(2 * 512 * 4096, nbytes + 4 * (4096 + 512))
        assert quantized_gated_product.cost(*args) == Cost(2 * 512 * 4096, nbytes + 4 * (4096 + 256))


def test_what_is_refused() -> None:
    x = randn(2, 256)
    data, scales, zeros, kind = weight(10, 256, "int4", symmetric=False)
    assert zeros is not None
    with pytest.raises(ValueError, match="kind is 'int5'"):
        quantized_linear(x, data, scales, zeros, "int5")
    with pytest.raises(TypeError, match=r"weight has dtype torch\.uint8; of int8 it must be torch\.int8"):
        quantized_linear(x, data, scales, zeros, "int8")
    with pytest.raises(ValueError, match=r"weight has shape \(10, 128\); for x of \(2, 128\) it must be \(N, K / 2\)"):
        quantized_linear(x[:, :128], data, scales, zeros, kind)
    with pytest.raises(ValueError, match="a multiple of 16"):
        quantized_linear(x[:, :8], torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), None, "int8")
    with pytest.raises(ValueError, match=r"scales have shape \(10, 1\); they must be \(10, G\), G one of 8, 4, 2"):
        quantized_linear(x, data, scales[:, :1], zeros[:, :1], kind)
    with pytest.raises(ValueError, match=r"zeros have shape \(10, 1\)"):
        quantized_linear(x, data, scales, zeros[:, :1], kind)
    with pytest.raises(TypeError, match=r"zeros have dtype torch\.int8"):
        quantized_linear(x, data, scales, zeros.to(torch.int8), kind)
    with pytest.raises(TypeError, match=r"scales has dtype torch\.int64"):
        quantized_linear(x, data, scales.long(), zeros, kind)
    eight = weight(10, 256, "int8")
    with pytest.raises(ValueError, match=r"scales has shape \(9,\); it must be \(10,\)"):
        quantized_linear(x, eight[0], eight[1][:9], None, "int8")
    with pytest.raises(ValueError, match="zeros are given, which int8 does not have"):
        quantized_linear(x, eight[0], eight[1], zeros, "int8")
    with pytest.raises(ValueError, match="residual has shape"):
        quantized_linear(x, *eight, None, "none", x)
    with pytest.raises(TypeError, match="bias has dtype"):
        quantized_linear(x, *eight, torch.ones(10).half())
    with pytest.raises(ValueError, match="activation is 'relu'"):
        quantized_gated_product(x, *eight, None, "relu")
    with pytest.raises(ValueError, match="gate_up_weight has 9 rows"):
        quantized_gated_product(x, eight[0][:9], eight[1][:9], None, "int8")


def test_reasons() -> None:
    off_gpu = "the inputs are on cpu, not on a CUDA device"
    why_not, stored = quantized_linear.impls["gluon_gemv"].why_not, weight(10, 256, "int8")
    x = randn(17, 256, dtype=torch.float16)
    for rows in (1, 16):
        assert why_not(x[:rows], *stored) == [off_gpu]
    assert why_not(x, *stored) == [off_gpu, "x has 17 rows; the kernel takes up to 16"]
    assert "takes float16 and bfloat16" in why_not(x[:1].float(), *stored)[-1]
    assert "contiguous along K" in why_not(randn(256, 2).half().t(), *stored)[-1]
    across = stored[0].t().contiguous().t()
    assert "must be contiguous" in why_not(x[:1], across, *stored[1:])[-1]
    assert "scales are torch.float64" in why_not(x[:1], stored[0], stored[1].double(), None, "int8")[-1]
    shifted = torch.zeros(10 * 256 + 8, dtype=torch.int8)[8:].view(10, 256)
    assert why_not(x[:1], shifted, *stored[1:]) == [off_gpu, "the weight does not begin at a multiple of 16 bytes"]
    grouped = weight(10, 256, "int4")
    assert why_not(x[:1], *grouped) == [off_gpu]
    assert quantized_gated_product.impls["gluon_gemv"].why_not(x[:1], *grouped) == [off_gpu]
    by_64 = weight(10, 256, "int4", group_size=64)
    assert why_not(x[:1], *by_64) == [off_gpu, "64 columns share a scale; the kernel takes groups of 128"]
    zeros = weight(10, 256, "int4", symmetric=False)
    assert why_not(x[:1], *zeros) == [off_gpu, "there are zeros, which the kernel does not subtract"]
    assert "K is above 32768" in why_not(x.new_zeros(1, 32784), *weight(2, 32784, "int8"))[-1]
    with use(quantized_linear="gluon_gemv"), pytest.raises(ValueError, match="not on a CUDA device"):
        quantized_linear(x[:1], *stored)
