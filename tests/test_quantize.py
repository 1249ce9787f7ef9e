"""Quantized weights: storage, rounding, errors' size, scales searched, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.quantize import KINDS, Kind, QuantizedWeight, columns_of, dequantize, quantize_weight

GROUPS = (32, 64, 128)


def _weight(rows: int = 20, columns: int = 384) -> Tensor:
    return randn(rows, columns, seed=1, outliers=0) / columns**0.5


def _error(quantized: QuantizedWeight, weight: Tensor) -> float:
    return float((quantized.dequantize() - weight).square().mean().sqrt() / weight.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored(kind: Kind) -> None:
    weight = _weight()
    quantized = quantize_weight(weight, kind)
    packed = kind == "int4"
    assert quantized.data.shape == ((20, 192) if packed else (20, 384))
    assert quantized.data.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert quantized.scales.shape == ((20, 3) if packed else (20,))
    assert (quantized.kind, quantized.group_size, quantized.shape) == (kind, 128 if packed else 384, (20, 384))
    assert quantized.zeros is None
    assert columns_of(quantized.data, kind) == 384
    assert quantized.data.is_contiguous()
    assert quantized.nbytes == (20 * 192 + 60 * 4 if packed else 20 * 384 + 20 * 4)
    zeros = quantize_weight(weight, "int4", 64, symmetric=False).zeros
    assert zeros is not None
    assert (zeros.shape, zeros.dtype) == ((20, 6), torch.uint8)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_where_a_column_of_8_bits_is(kind: Kind) -> None:
    """Two columns that follow each other are two bytes of a word that are half a word apart."""
    for column in range(32):
        weight = torch.zeros(1, 32)
        weight[0, column] = 1
        (at,) = quantize_weight(weight, kind).data[0].nonzero()[0].tolist()
        assert at == column // 4 * 4 + (0, 2, 1, 3)[column % 4]


def test_where_a_column_of_4_bits_is() -> None:
    """A word has eight columns: the even ones, then the odd ones, from its lowest bits on."""
    for column in range(256):
        weight = torch.zeros(1, 256)
        weight[0, column] = 1  # -8 times its scale: stored as 0, and zeros are stored as 8
        data = quantize_weight(weight, "int4", search=False).data[0]
        (at,) = (data != 0x88).nonzero()[0].tolist()
        nibble = (0, 4, 1, 5, 2, 6, 3, 7)[column % 8]
        assert at == column // 8 * 4 + nibble // 2
        assert data[at] == (0x08 if nibble % 2 else 0x80)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_that_can_be_stored_come_back_exactly(kind: Kind, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "fp8":
        weight = torch.randn(6, 256, generator=generator).to(torch.float8_e4m3fn).float()
        weight[:, 3] = 448
    else:
        low, high = (-127, 127) if kind == "int8" else (-8, 7)
        weight = torch.randint(low, high + 1, (6, 256), generator=generator).float()
        weight.view(6, 8, 32)[..., 0], weight.view(6, 8, 32)[..., 1] = low, high
    for group in GROUPS:
        quantized = quantize_weight(weight / 64, kind, group, symmetric=symmetric)
        assert torch.equal(quantized.dequantize(), weight / 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_the_nearest(kind: Kind) -> None:
    """No entry would be nearer with a neighbouring number."""
    weight = _weight()
    quantized = quantize_weight(weight, kind, search=False)
    scales = quantized.scales[:, None] if kind != "int4" else quantized.scales.repeat_interleave(128, dim=1)
    error = (quantized.dequantize() - weight).abs()
    if kind == "fp8":  # three bits behind the point of each power of two, down to 2 ** -9
        exponent = (weight / scales).abs().log2().floor().clamp_min(-6)
        step = torch.exp2(exponent - 3) * scales
    else:
        step = scales.abs()
    clipped = (weight / scales > 7.5) if kind == "int4" else torch.zeros_like(weight, dtype=torch.bool)
    assert (error <= step * 0.5001)[~clipped].all()
    assert (error <= step)[clipped].all()


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.010), ("fp8", 0.028), ("int4", 0.101)])
def test_errors_of_normal_weights(kind: Kind, most: float) -> None:
    weight = _weight(128, 1024)
    found, unsearched = (_error(quantize_weight(weight, kind, search=search), weight) for search in (True, False))
    assert found <= unsearched
    assert found < most
    if kind == "int4":
        assert found < 0.95 * unsearched
        by_group = [_error(quantize_weight(weight, kind, group), weight) for group in GROUPS]
        assert by_group == sorted(by_group)
        assert _error(quantize_weight(weight, kind, symmetric=False), weight) < found
    assert _error(quantize_weight(weight.double(), kind), weight) == _error(quantize_weight(weight, kind), weight)


def test_what_lies_to_one_side_gains_by_zeros() -> None:
    weight = _weight().abs() + 0.01
    symmetric, zeros = (_error(quantize_weight(weight, "int4", symmetric=s), weight) for s in (True, False))
    assert zeros < 0.6 * symmetric


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_before_the_entries(dtype: torch.dtype) -> None:
    weight = _weight(64, 512).to(dtype)
    narrow, wide = quantize_weight(weight, "int4"), quantize_weight(weight, "int4", scale_dtype=torch.float32)
    assert (narrow.scales.dtype, wide.scales.dtype) == (dtype, torch.float32)
    assert quantize_weight(weight, "int8").scales.dtype == torch.float32
    assert _error(narrow, weight.float()) < 1.01 * _error(wide, weight.float())
    result = narrow.dequantize(dtype)
    assert result.dtype == dtype
    assert torch.equal(result, narrow.dequantize().to(dtype))
    assert narrow.dequantize(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_of_one_number(kind: Kind, symmetric: bool) -> None:
    weight = torch.zeros(3, 128)
    weight[1], weight[2] = 0.7, -0.3
    for dtype in (torch.float32, torch.float16):
        rounded = weight.to(dtype)
        quantized = quantize_weight(rounded, kind, symmetric=symmetric)
        assert not quantized.dequantize()[0].any()
        off = (quantized.dequantize() - rounded.float()).abs()
        assert (off <= torch.finfo(quantized.scales.dtype).eps * rounded.float().abs()).all(), (
            "but the scale is rounded"
        )


def test_parts_of_a_large_weight_are_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(21, 256)
    for kind in KINDS:
        whole = quantize_weight(weight, kind, symmetric=False)
        with monkeypatch.context() as patch:
            patch.setattr("burnish.quantize._AT_ONCE", 1024)
            parts = quantize_weight(weight, kind, symmetric=False)
        assert torch.equal(whole.data, parts.data)
        assert torch.equal(whole.scales, parts.scales)


def test_rows_can_be_taken_out_of_what_is_stored() -> None:
    quantized = quantize_weight(_weight(), "int4", symmetric=False)
    assert quantized.zeros is not None
    rows = dequantize(quantized.data[5:9], quantized.scales[5:9], quantized.zeros[5:9], "int4")
    assert torch.equal(rows, quantized.dequantize()[5:9])


def test_the_weight_is_not_written_to() -> None:
    weight = torch.nn.Parameter(_weight())
    before = weight.detach().clone()
    for kind in KINDS:
        assert not quantize_weight(weight, kind).dequantize().requires_grad
    assert torch.equal(weight, before)
    assert weight._version == 0


def test_refusals() -> None:
    weight = _weight()
    with pytest.raises(ValueError, match="kind is 'int3'; it must be one of int8, int4, fp8"):
        quantize_weight(weight, "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size is 48; it must be one of 32, 64, 128"):
        quantize_weight(weight, "int4", 48)
    with pytest.raises(ValueError, match="weight has 352 columns; of int4 128 are stored together"):
        quantize_weight(weight[:, :352], "int4", 32)
    with pytest.raises(ValueError, match="weight has 15 columns; of fp8 16 are stored together"):
        quantize_weight(weight[:, :15], "fp8")
    with pytest.raises(ValueError, match=r"weight has shape \(384,\)"):
        quantize_weight(weight[0], "int8")
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int64"):
        quantize_weight(weight.long(), "int8")
    weight[3, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight, "int8")
