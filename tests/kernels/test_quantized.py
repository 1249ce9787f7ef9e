"""The kernels for quantized weights in the interpreter: sizes, strides, gates, splits, numbers, bits."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import quantized_gated_product, quantized_linear
from burnish.quantize import Kind, quantize_weight

pytest.importorskip("triton")

from burnish.kernels import counters
from burnish.kernels.launch import INTERPRETED, Config, Launch, Target, recording
from burnish.kernels.matmul_configs import Product
from burnish.kernels.quantized import quantized_gemv, quantized_gemv_configs, selector
from burnish.kernels.quantized_skinny import quantized_skinny, quantized_skinny_configs
from tests.slow import slow

KINDS: list[tuple[Kind, int, bool]] = [
    ("int8", 128, True),
    ("fp8", 128, True),
    ("int4", 128, True),
    ("int4", 64, False),
    ("int4", 32, False),
    ("int4", 32, True),
]
Weight = tuple[Tensor, Tensor, Tensor | None, str]
H200 = Target((9, 0), 132)


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _weight(
    rows: int, columns: int, kind: Kind, group: int = 128, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Weight:
    wide = randn(rows, columns, seed=1) / columns**0.5
    weight = quantize_weight(wide, kind, group, symmetric=symmetric, scale_dtype=dtype)
    return weight.data, weight.scales, weight.zeros, weight.kind


def _gemv_config(rows: int, block_n: int = 4, block_c: int = 4) -> Config:
    return Config.of(BLOCK_M=rows, BLOCK_N=block_n, BLOCK_C=block_c)


def _skinny_config(split: int = 1, block_n: int = 16) -> Config:
    return Config.of(BLOCK_M=16, BLOCK_N=block_n, BLOCK_W=16, SPLIT_K=split)


def _assert_right(result: Tensor, *args: Any) -> None:
    reference = quantized_linear.reference
    assert_close(result, reference(*args), oracle(reference, *args))
    assert result.is_contiguous()


@pytest.mark.parametrize(("kind", "group", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, *map(slow, (torch.float32, torch.float16))], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(kind: Kind, group: int, symmetric: bool, dtype: torch.dtype, rows: int) -> None:
    columns = 384 if kind == "int4" else 208  # blocks of 4 chunks: neither is whole ones
    x, weight = _tensor(rows, columns, seed=0, dtype=dtype), _weight(9, columns, kind, group, symmetric, dtype)
    bias, residual = _tensor(9, seed=2, dtype=dtype), _tensor(rows, 9, seed=3, dtype=dtype)
    for args, block_c in (((x, *weight), 4), ((x, *weight, bias, "gelu", residual), 8)):
        _assert_right(quantized_gemv(*args, config=_gemv_config(1 if rows == 1 else 4, block_c=block_c)), *args)


@pytest.mark.parametrize(("kind", "group", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("rows", [2, 16])
def test_some_rows(kind: Kind, group: int, symmetric: bool, dtype: torch.dtype, rows: int) -> None:
    columns = 384 if kind == "int4" else 208  # 52 words: no whole blocks
    x, weight = _tensor(rows, columns, seed=0, dtype=dtype), _weight(37, columns, kind, group, symmetric, dtype)
    bias, residual = _tensor(37, seed=2, dtype=dtype), _tensor(rows, 37, seed=3, dtype=dtype)
    for args, split in (((x, *weight), 1), ((x, *weight, bias, "gelu", residual), 2)):
        _assert_right(quantized_skinny(*args, config=_skinny_config(split)), *args)


@pytest.mark.parametrize(("kind", "group", "symmetric"), [*KINDS[:3], *(slow(*kind) for kind in KINDS[3:])])
@pytest.mark.parametrize("columns", [slow(1), 22])
def test_gates(kind: Kind, group: int, symmetric: bool, columns: int) -> None:
    weight, bias = _weight(2 * columns, 256, kind, group, symmetric), _tensor(2 * columns, seed=2)
    reference = quantized_gated_product.reference
    for rows in (1, 3):
        x = _tensor(rows, 256, seed=0)
        for args in ((x, *weight), (x, *weight, bias, "gelu_tanh")):
            eager, truth = reference(*args), oracle(reference, *args)
            bound = quantized_gated_product.bind(*args)
            assert_close(quantized_gemv(*bound, gated=True, config=_gemv_config(4)), eager, truth)
            for split in (1, 2):
                result = quantized_skinny(*bound, gated=True, config=_skinny_config(split))
                assert_close(result, eager, truth)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_config(kind: Kind) -> None:
    weight = _weight(70, 256, kind)
    for rows in (1, 4):
        args = quantized_linear.bind(_tensor(rows, 256, seed=0), *weight, None, "silu")
        eager, truth = quantized_linear.reference(*args), oracle(quantized_linear.reference, *args)
        for name in ("triton_gemv", "triton_skinny"):
            impl = quantized_linear.impls[name]
            for config in impl.configs(*args):  # type: ignore[misc]
                assert_close(impl.fn(*args, config=config), eager, truth)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_number_that_can_be_stored(kind: Kind) -> None:
    """A row of x that is 1 at one column gives what is stored there, exactly."""
    if kind == "int8":
        entries = torch.arange(-128, 128).to(torch.int8)
    elif kind == "fp8":
        entries = torch.arange(256).to(torch.uint8)
        entries[[0x7F, 0xFF]] = 0  # NaN
    else:
        entries = torch.arange(256).to(torch.uint8)  # both halves
    data = entries[torch.randperm(256, generator=torch.Generator().manual_seed(0))].view(2, 128)
    columns = 256 if kind == "int4" else 128
    scales = torch.ones(2, 2) if kind == "int4" else torch.ones(2)
    zeros = torch.tensor([[0, 15], [8, 3]], dtype=torch.uint8) if kind == "int4" else None
    expected = quantized_linear.reference(torch.eye(columns), data, scales, zeros, kind)
    for start in range(0, columns, 16):
        x = torch.eye(columns, dtype=torch.float16)[start : start + 16]
        result = quantized_skinny(x, data, scales, zeros, kind, config=_skinny_config())
        assert torch.equal(result.float(), expected[start : start + 16])
        for dtype in (torch.float32, torch.float16):
            few = quantized_gemv(x[:8].to(dtype), data, scales, zeros, kind, config=_gemv_config(8, 2, 8))
            assert torch.equal(few.float(), expected[start : start + 8])


def test_bits_are_put_where_the_plain_form_puts_them() -> None:
    """The instruction that the interpreter does not run, as PTX defines it."""

    def prmt(a: int, b: int, chosen: int) -> int:
        octets = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        return int.from_bytes(bytes(octets[chosen >> 4 * i & 7] for i in range(4)), "little")

    for j in range(4):
        for word in (0x0F0A0501, 0x80FF7F00, 0xFFFFFFFF):
            for to, magic in ((2, 0x43), (0, 0x4B)):
                assert prmt(word, magic, selector(j, to)) == magic << 24 | (word >> 8 * j & 0xFF) << 8 * to
    for q in range(16):
        assert struct.unpack("<f", struct.pack("<I", 0x43000000 | q << 16))[0] == 128 + q
    for byte in range(256):
        assert struct.unpack("<f", struct.pack("<I", 0x4B000000 | byte))[0] == 2**23 + byte


@pytest.mark.parametrize("parts", [slow(2), 3, slow(8)])
def test_split_sums_are_the_same_each_time_and_leave_no_trace(parts: int) -> None:
    for kind in ("int8", "int4"):
        weight = _weight(40, 512, kind)
        args = (_tensor(3, 512, seed=0), *weight, _tensor(40, seed=2), "gelu", _tensor(40, seed=3).expand(3, 40))
        first = quantized_skinny(*args, config=_skinny_config(parts))
        _assert_right(first, *args)
        assert torch.equal(first, quantized_skinny(*args, config=_skinny_config(parts)))
    assert all(not counter.any() for counter in counters._counters.values())


def test_strided_inputs_are_read_in_place() -> None:
    packed, bias = _tensor(2, 3, 3 * 128, seed=0), _tensor(80, seed=2)[::2]
    for kind in ("int8", "fp8", "int4"):
        data, scales, zeros, _ = _weight(60, 128, kind)
        weight = data[10:50], scales[10:50], zeros, kind  # rows of a packed weight
        for x in (packed[..., 128:256], packed[:, :, ::3], packed.transpose(0, 1)[..., :128]):
            args = (x, *weight, bias, "silu", _tensor(40, *x.shape[:-1], seed=3).permute(1, 2, 0))
            _assert_right(quantized_gemv(*args, config=_gemv_config(8, block_n=16)), *args)
            _assert_right(quantized_skinny(*args, config=_skinny_config()), *args)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_nan_or_infinity_spoils_no_other(bad: float) -> None:
    x = _tensor(3, 256, seed=0)
    x[1, 5] = bad
    for kind in ("int8", "fp8", "int4"):
        weight = _weight(20, 256, kind)
        for result in (quantized_gemv(x, *weight, config=_gemv_config(4)), quantized_skinny(x, *weight)):
            assert not result[1].isfinite().any()
            assert result[[0, 2]].isfinite().all()


def test_sums_that_float16_does_not_hold() -> None:
    x = _tensor(2, 256, seed=0).clamp(-2, 2) * 2000
    for kind in ("int8", "fp8"):
        args = (x, *_weight(20, 256, kind))
        _assert_right(quantized_gemv(*args, config=_gemv_config(2)), *args)
        _assert_right(quantized_skinny(*args), *args)


def test_x_that_is_not_around_zero() -> None:
    """What is left of the 136 that int4's entries are moved by."""
    x = _tensor(2, 512, seed=0) + 20
    for symmetric in (True, False):
        args = (x, *_weight(20, 512, "int4", symmetric=symmetric))
        _assert_right(quantized_gemv(*args, config=_gemv_config(2)), *args)
        _assert_right(quantized_skinny(*args), *args)


def test_the_weight_and_its_scales_are_asked_for_before_the_wait() -> None:
    """As far as it can be seen without a GPU: where the kernels load and wait."""
    import inspect

    for kernel in (quantized_gemv, quantized_skinny):
        module = inspect.getsource(sys.modules[kernel.__module__])
        source = module[module.index("launch_dependents(PDL)") :]
        before, after = source.split("wait_for_inputs(PDL)", 1)
        assert "prefetch_weight(scales_ptr" in before
        assert "tl.load(scale_ptrs)" in before
        assert "tl.load(word_ptrs" in before or "prefetch_weight(weight_ptr" in before
        assert "x_ptrs," not in before
        assert "tl.store" not in before
        assert "x_ptrs," in after or "x_ptrs +" in after


def test_configs() -> None:
    for kind in ("int8", "int4"):
        one = quantized_gemv_configs(Product(1, 4096, 4096, torch.bfloat16, H200), kind)
        assert len({str(config) for config in one}) == len(one) >= 4
        assert all(config["BLOCK_C"] == 32 * config.num_warps for config in one), "a thread has one chunk of every row"
        shallow = quantized_gemv_configs(Product(1, 64, 256, torch.bfloat16, H200), kind)
        assert {config.num_warps for config in shallow} == {1}
        gated = quantized_gemv_configs(Product(4, 4096, 4096, torch.bfloat16, H200, gated=True), kind)
        assert {config["BLOCK_N"] for config in gated} == {2}
        deep = quantized_gemv_configs(Product(1, 4096, 14336, torch.bfloat16, H200), kind)
        assert all(14336 // (32 if kind == "int4" else 16) % config["BLOCK_C"] == 0 for config in deep)
        for group in (128, 32):
            narrow = quantized_skinny_configs(Product(16, 4096, 14336, torch.bfloat16, H200), kind, group)
            assert max(config["SPLIT_K"] for config in narrow) == 8
            wide = quantized_skinny_configs(Product(16, 128256, 4096, torch.bfloat16, H200), kind, group)
            assert {config["SPLIT_K"] for config in wide} == {1}
            assert len({str(config) for config in narrow}) == len(narrow)
    assert quantized_skinny_configs(Product(16, 64, 256, torch.bfloat16, INTERPRETED), "int4", 128)


def test_a_launch_names_what_it_needs() -> None:
    launches: list[Launch] = []
    with recording(launches.append, H200):
        quantized_gemv(_tensor(1, 256, seed=0), *_weight(8, 256, "int4", 64, False))
        quantized_gemv(_tensor(1, 256, seed=0).float(), *_weight(8, 256, "int8"))
    int4, int8 = launches
    assert (int4.constants["GROUP"], int4.constants["EXACT"], int8.constants["EXACT"]) == (64, False, True)
    assert int8.args[3] is None
    assert int4.args[1].dtype == torch.int32
    assert int4.options["launch_pdl"]


@pytest.mark.slow
def test_at_models_sizes_nothing_spills_and_few_instructions_do() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot_quantized"]
    run = subprocess.run(command, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    compiled = json.loads(run.stdout)
    assert len(compiled) > 200
    assert not [entry for entry in compiled if "error" in entry or entry["spills"] or entry["moved"]]
    first: dict[str, float] = {}  # of one row of x in bfloat16
    for entry in compiled:
        if entry["capability"] == 90 and "gemv torch.bfloat16 (1, 1, 4096)" in entry["label"]:
            assert not entry["barriers"]
            kind = entry["label"].split(") ")[1].split(" (")[0]
            first.setdefault(kind, entry["per_byte"])
    # An H200 has time for 7 to 8 while a byte arrives.
    assert first["int8"] < 4.6
    assert first["fp8"] < 6.3
    assert first["int4"] < 7.1
    assert first["int4 zeros"] < 7.6
