"""The kernel that writes a weight of 8 or 4 bits out: PyTorch's numbers, to the last bit, whatever is stored."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.ops import quantized_gated_product, quantized_linear
from burnish.quantize import Kind, QuantizedWeight, dequantize, quantize_weight
from tests.ops.matrix import DTYPES

pytest.importorskip("triton")

from burnish.kernels import dequantize as module
from burnish.kernels.dequantize import dequantize_configs, dequantize_weight
from burnish.kernels.launch import Config

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BY_GROUP = [
    pytest.param("int4", {"group_size": group, "symmetric": symmetric}, id=f"int4, {group}, {label}")
    for group in (32, 64, 128)
    for symmetric, label in ((True, "no zeros"), (False, "zeros"))
]
STORED = pytest.mark.parametrize(
    ("kind", "options"), [pytest.param("int8", {}, id="int8"), pytest.param("fp8", {}, id="fp8"), *BY_GROUP]
)


def weight(rows: int, columns: int, kind: Kind, **options: Any) -> QuantizedWeight:
    return quantize_weight(randn(rows, columns, seed=1) / columns**0.5, kind, search=False, **options)


def cut_off(exact: Tensor) -> Tensor:
    """Float32 as bfloat16, as the interpreter does it; a GPU rounds it, see `tests/gpu/test_dequantize.py`."""
    return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def assert_same(
    data: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, dtype: torch.dtype, config: Config | None = None
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result = dequantize_weight(data, scales, zeros, kind, dtype, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.dtype == dtype
    assert result.is_contiguous()
    exact = dequantize(data, scales, zeros, kind, torch.float32)
    assert torch.equal(result, cut_off(exact) if dtype == torch.bfloat16 else exact.to(dtype))


@DTYPE
@STORED
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_weights(kind: Kind, options: dict[str, Any], scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    q = weight(33, 384, kind, scale_dtype=scale_dtype, **options)
    assert_same(q.data, q.scales, q.zeros, kind, dtype)


@DTYPE
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_byte_in_every_place_of_a_word(kind: Kind, dtype: torch.dtype) -> None:
    """By a scale that has every bit of float32's mantissa: each product is rounded."""
    octets = torch.arange(256).to(torch.uint8)
    if kind == "fp8":
        octets[[0x7F, 0xFF]] = 0  # NaN, which no weight has
    data = torch.cat([octets.roll(shift) for shift in range(4)]).view(4, 256)
    scales = torch.tensor([1 / 3, -1 / 7, 2.0**-12 / 3, 100 / 3])
    if kind == "int4":
        scales = scales[:, None].repeat(1, 4)
    assert_same(data.view(torch.int8) if kind == "int8" else data, scales, None, kind, dtype)


@pytest.mark.parametrize("zero", range(16))
def test_every_zero(zero: int) -> None:
    q = weight(4, 128, "int4", group_size=32, symmetric=False)
    zeros = torch.full((4, 4), 3, dtype=torch.uint8)
    zeros[1, 2], zeros[3, 3] = zero, 15 - zero
    assert_same(q.data, q.scales, zeros, "int4", torch.bfloat16)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1e6), (torch.float16, 2.0**-14), (torch.float32, 1e-38)])
def test_infinities_and_subnormal_numbers(kind: Kind, dtype: torch.dtype, factor: float) -> None:
    q = weight(4, 64, kind)
    assert_same(q.data, q.scales * factor, None, kind, dtype)


@pytest.mark.parametrize(
    ("rows", "columns", "config"),
    [
        (1, 16, None),
        (7, 80, Config.of(num_warps=1, ROWS=4, BLOCK=32)),
        (8, 64, Config.of(num_warps=1, ROWS=4, BLOCK=32)),
        (5, 2064, Config.of(num_warps=4, ROWS=1, BLOCK=2048)),
        (3, 272, Config.of(num_warps=4, ROWS=2, BLOCK=512)),
    ],
)
def test_sizes_that_are_no_whole_blocks(rows: int, columns: int, config: Config | None) -> None:
    for kind in ("int8", "fp8"):
        q = weight(rows, columns, kind)
        assert_same(q.data, q.scales, None, kind, torch.bfloat16, config)


@pytest.mark.parametrize("config", [Config.of(num_warps=1, ROWS=4, BLOCK=64), Config.of(ROWS=16, BLOCK=32)], ids=str)
def test_groups_that_are_no_whole_blocks(config: Config) -> None:
    q = weight(5, 384, "int4", group_size=64, symmetric=False)
    assert_same(q.data, q.scales, q.zeros, "int4", torch.float16, config)


@STORED
def test_rows_of_a_packed_weight(kind: Kind, options: dict[str, Any]) -> None:
    q = weight(11, 256, kind, **options)
    rows = slice(3, 8)
    zeros = None if q.zeros is None else q.zeros[rows]
    assert_same(q.data[rows], q.scales[rows], zeros, kind, torch.bfloat16)
    whole = dequantize_weight(q.data, q.scales, q.zeros, kind, torch.bfloat16)
    assert torch.equal(dequantize_weight(q.data[rows], q.scales[rows], zeros, kind, torch.bfloat16), whole[rows])


@STORED
@pytest.mark.parametrize("columns", [128, 384, 4096])
def test_configs_are_few_distinct_and_right(kind: Kind, options: dict[str, Any], columns: int) -> None:
    q = weight(3, columns, kind, **options)
    configs = dequantize_configs(q.data, q.scales, kind)
    assert 2 <= len(set(configs)) == len(configs) <= 3
    for config in configs:
        assert_same(q.data, q.scales, q.zeros, kind, torch.bfloat16, config)


def test_all_is_read_before_the_wait_and_written_after_it() -> None:
    """As far as it can be seen without a GPU: where the kernel loads, stores and waits."""
    source = inspect.getsource(module)
    before, after = source[source.index("def dequantize_kernel") :].split("wait_for_inputs(PDL)")
    assert "tl.store" not in before
    assert "tl.load" not in after


@pytest.mark.parametrize("op", [quantized_linear, quantized_gated_product], ids=lambda op: op.name)
def test_reasons(op: Any) -> None:
    why_not, off_gpu = op.impls["triton_dequantize"].why_not, "the inputs are on cpu, not on a CUDA device"
    x, q = randn(40, 256, dtype=torch.float16), weight(10, 256, "int4", symmetric=False)
    assert q.zeros is not None
    for rows in (x, x[:1], x.float(), randn(256, 2).t()):
        assert why_not(rows, q.data, q.scales, q.zeros, "int4") == [off_gpu]
    assert "the inputs are torch.float64" in why_not(x.double(), q.data, q.scales, q.zeros, "int4")[1]
    assert why_not(x[:0], q.data, q.scales, q.zeros, "int4")[1] == "an input is empty"
    assert why_not(x, q.data[:0], q.scales[:0], q.zeros[:0], "int4")[1] == "a weight is empty"
    assert "scales are torch.float64" in why_not(x, q.data, q.scales.double(), q.zeros, "int4")[1]
    across = [tensor.t().contiguous().t() for tensor in (q.data, q.scales, q.zeros)]
    for i, name in enumerate(("the weight", "scales", "zeros")):
        stored = [q.data, q.scales, q.zeros]
        stored[i] = across[i]
        assert why_not(x, *stored, "int4") == [
            off_gpu,
            f"{name} has strides {across[i].stride()}; it must be contiguous",
        ]
    shifted = torch.zeros(10 * 128 + 8, dtype=torch.uint8)[8:].view(10, 128)
    assert "begin at a multiple of 16 bytes" in why_not(x, shifted, q.scales, q.zeros, "int4")[1]
