"""The kernel for up to 16 rows of x and weights of 16, 8 or 4 bits, in the emulator: sizes, strides, gates, numbers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.layout import MAX_GEMV_MMA_DEPTH
from burnish.numerics import assert_close, oracle, randn
from burnish.ops import linear, quantized_gated_product, quantized_linear
from burnish.ops._activations import activate
from burnish.quantize import Kind, quantize_weight

pytest.importorskip("triton")

from burnish.kernels import gemv_mma as module
from burnish.kernels.gemv_mma import MAX_STEPS, block_m, gemv_mma, gemv_mma_configs
from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.matmul_configs import Product
from burnish.kernels.widen import STEP_COLUMNS
from tests.kernels.gluon_emulator import emulate

KINDS = ["none", "int8", "fp8", "int4"]
STORED: list[Kind] = ["int8", "fp8", "int4"]
KIND = pytest.mark.parametrize("kind", KINDS)
INTEGER = pytest.mark.parametrize("kind", ["int8", "int4"])
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
H200 = Target((9, 0), 132)
Weight = tuple[Any, ...]
"""The arguments of `linear` or `quantized_linear` that stand for a weight."""


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _weight(rows: int, columns: int, kind: str, dtype: torch.dtype = torch.bfloat16) -> Weight:
    wide = randn(rows, columns, seed=1) / columns**0.5
    if kind == "none":
        return (wide.to(dtype),)
    stored = quantize_weight(wide, kind, search=False)  # type: ignore[arg-type]
    return stored.data, stored.scales, stored.zeros, stored.kind


def _config(warps: int = 4, ahead: int = 1, **more: int) -> Config:
    return Config.of(num_warps=warps, num_stages=1, AHEAD=ahead, **more)


def _run(x: Tensor, weight: Weight, *rest: Any, gated: bool = False, config: Config | None = None) -> Tensor:
    data, scales, _, kind = weight if len(weight) > 1 else (*weight, None, None, "none")
    launches: list[Launch] = []
    with recording(launches.append, H200):
        out = gemv_mma(x, data, *rest, gated=gated, config=config, kind=kind, scales=scales)
    emulate(launches[0])
    return out


def _gated(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return activate(gate, activation) * up


def _assert_right(x: Tensor, weight: Weight, *rest: Any, config: Config | None = None) -> None:
    reference = linear.reference if len(weight) == 1 else quantized_linear.reference
    args, result = (x, *weight, *rest), _run(x, weight, *rest, config=config)
    assert_close(result, reference(*args), oracle(reference, *args))
    assert result.is_contiguous()


def _assert_right_gated(x: Tensor, weight: Weight, *rest: Any, config: Config | None = None) -> None:
    reference = _gated if len(weight) == 1 else quantized_gated_product.reference
    args, activated = (x, *weight, *rest), rest or (None, "silu")
    assert_close(_run(x, weight, *activated, gated=True, config=config), reference(*args), oracle(reference, *args))


# Columns that are not whole steps of both warps; but for int4, which is stored in steps, not of one warp either, and
# those of a dense weight are not even whole loads.
DEPTHS = {"none": 205, "int8": 208, "fp8": 208, "int4": 384}


@KIND
@DTYPE
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
def test_rows(kind: str, dtype: torch.dtype, rows: int) -> None:
    depth, columns = DEPTHS[kind], 37
    x, weight = _tensor(rows, depth, seed=0, dtype=dtype), _weight(columns, depth, kind, dtype)
    bias, residual = _tensor(columns, seed=2, dtype=dtype), _tensor(rows, columns, seed=3, dtype=dtype)
    _assert_right(x, weight, config=_config(2))
    _assert_right(x, weight, bias, "gelu", residual, config=_config(2, ahead=2))


@KIND
@pytest.mark.parametrize("columns", [1, 22, 16])
def test_gates(kind: str, columns: int) -> None:
    weight, bias = _weight(2 * columns, 256, kind), _tensor(2 * columns, seed=2)
    for rows in (1, 9):
        x = _tensor(rows, 256, seed=0)
        _assert_right_gated(x, weight)
        _assert_right_gated(x, weight, bias, "gelu_tanh")


@KIND
@pytest.mark.parametrize("sizes", [(1, 16, 384), (16, 40, 1024), (8, 33, 4096), (2, 16, 128)], ids=str)
def test_every_config(kind: str, sizes: tuple[int, int, int]) -> None:
    rows, columns, depth = sizes
    x, weight = _tensor(rows, depth, seed=0), _weight(2 * columns, depth, kind)
    for gated in (False, True):
        product = Product(rows, columns, depth, torch.bfloat16, H200, gated)
        for config in gemv_mma_configs(product, kind):
            (_assert_right_gated if gated else _assert_right)(x, weight, config=config)


@KIND
def test_a_number_of_steps_that_loads_ahead_do_not_divide(kind: str) -> None:
    depth = 5 * 2 * STEP_COLUMNS[kind]
    x, weight = _tensor(2, depth, seed=0), _weight(16, depth, kind)
    for ahead in (1, 2, 3, 4, 5):
        _assert_right(x, weight, config=_config(2, ahead))


@KIND
def test_as_many_steps_as_there_may_be(kind: str) -> None:
    depth = MAX_STEPS * STEP_COLUMNS[kind]
    x, weight = _tensor(1, depth, seed=0), _weight(16, depth, kind)
    _assert_right(x, weight, config=_config(1, 8))


@KIND
def test_strided_inputs_are_read_in_place(kind: str) -> None:
    packed, bias, weight = _tensor(2, 3, 3 * 128, seed=0), _tensor(80, seed=2)[::2], _weight(60, 128, kind)
    stored = (weight[0][10:50], *(part[10:50] for part in weight[1:2]), *weight[2:])  # rows of a packed weight
    for x in (packed[..., 128:256], packed[:, ::2, :128], packed.transpose(0, 1)[..., :128]):
        residual = _tensor(40, *x.shape[:-1], seed=3).permute(1, 2, 0)
        _assert_right(x, stored, bias, "silu", residual)


def test_weights_with_columns_beyond_those_that_are_read() -> None:
    wide = torch.full((40, 200), float("nan"), dtype=torch.float16)
    wide[:, 8:168] = _tensor(40, 160, seed=1, dtype=torch.float16)
    _assert_right(_tensor(3, 160, seed=0, dtype=torch.float16), (wide[:, 8:168],))
    _assert_right_gated(_tensor(3, 160, seed=0, dtype=torch.float16), (wide[:, 8:168],))


@KIND
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_nan_or_infinity_spoils_no_other(kind: str, bad: float) -> None:
    x, weight = _tensor(3, DEPTHS[kind], seed=0), _weight(20, DEPTHS[kind], kind)
    expected = _run(x, weight)
    x[1, 5] = bad
    result = _run(x, weight)
    assert not result[1].isfinite().any()
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@INTEGER
@DTYPE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_infinity_in_a_single_row_makes_nan(kind: str, dtype: torch.dtype, bad: float) -> None:
    x, weight = _tensor(1, 512, seed=0, dtype=dtype), _weight(20, 512, kind)
    x[0, 200] = -bad
    assert _run(x, weight, config=_config(2)).isnan().all()


@INTEGER
@DTYPE
@pytest.mark.parametrize("case", ["outlier", "mean", "small", "large", "one", "zero"])
def test_a_single_row_of_any_magnitude(kind: str, dtype: torch.dtype, case: str) -> None:
    x = _tensor(1, 512, seed=0, dtype=dtype)
    if case == "outlier":  # 10,000 times as large as the others
        x[0, 77] = 10_000
    elif case == "mean":
        x = x / 8 + 20
    elif case == "zero":
        x = torch.zeros_like(x)
    elif case == "one":
        x = torch.zeros_like(x)
        x[0, 300] = 3
    else:
        least = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-30
        x = x * (least if case == "small" else 1000)
    weight = _weight(20, 512, kind, dtype)
    _assert_right(x, weight, config=_config(2))


@INTEGER
def test_rows_of_twice_the_height(kind: str) -> None:
    x, weight = _tensor(1, 1024, seed=0), _weight(2 * 37, 1024, kind)
    for config in (_config(2, 3, ROWS=32), _config(4, 2, ROWS=32)):
        _assert_right(x, weight, config=config)
        _assert_right_gated(x, weight, config=config)


def test_a_single_row_is_multiplied_as_integers_where_its_digits_fit() -> None:
    def rows(count: int, depth: int, kind: str, capability: tuple[int, int] = (9, 0)) -> int:
        return block_m(Product(count, 64, depth, torch.bfloat16, Target(capability, 100)), kind)

    assert [rows(1, 4096, kind) for kind in KINDS] == [8, 1, 8, 1]
    assert [rows(count, 4096, "int4") for count in (2, 8, 9, 16)] == [8, 8, 16, 16]
    assert [rows(1, depth, "int8") for depth in (8192, 14336, 16384, 28672)] == [1, 1, 1, 8]
    assert rows(1, 8192, "int8", (8, 6)) == 1


@INTEGER
@DTYPE
def test_digits_of_a_part_at_a_time(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 * 256 columns for two warps each, where each has 3.5 times as many."""
    monkeypatch.setattr(module, "_MOST_SHARED", 4096)
    x, weight = _tensor(1, 3584, seed=0, dtype=dtype), _weight(20, 3584, kind, dtype)
    _assert_right(x, weight, config=_config(2, 3))


@KIND
def test_x_that_is_not_around_zero(kind: str) -> None:
    x = _tensor(2, 512, seed=0) + 20
    _assert_right(x, _weight(20, 512, kind))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_sums_that_float16_does_not_hold(kind: str) -> None:
    x = _tensor(2, 256, seed=0, dtype=torch.float16).clamp(-2, 2) * 2000
    _assert_right(x, _weight(20, 256, kind))


@pytest.mark.parametrize("kind", STORED)
@DTYPE
def test_every_number_that_can_be_stored(kind: str, dtype: torch.dtype) -> None:
    """A row of x that is 1 at one column gives what is stored there, exactly."""
    entries = torch.arange(256).to(torch.uint8)  # of int4 both halves
    if kind == "fp8":
        entries[[0x7F, 0xFF]] = 0  # NaN
    data = entries[torch.randperm(256, generator=torch.Generator().manual_seed(0))].view(2, 128)
    data = data.view(torch.int8) if kind == "int8" else data
    columns = 256 if kind == "int4" else 128
    scales = torch.tensor([[1.0, 0.5], [2.0, -1.0]]) if kind == "int4" else torch.tensor([1.0, 0.5])
    expected = quantized_linear.reference(torch.eye(columns), data, scales, None, kind)
    for start in range(0, columns, 16):
        x = torch.eye(columns, dtype=dtype)[start : start + 16]
        assert torch.equal(_run(x, (data, scales, None, kind)).float(), expected[start : start + 16])
        assert torch.equal(_run(x[3:4], (data, scales, None, kind)).float(), expected[start + 3 : start + 4])


def test_every_column_of_x_meets_its_own() -> None:
    weight = _tensor(16, 205, seed=1, dtype=torch.float16)
    for start in range(0, 205, 16):
        x = torch.eye(205, dtype=torch.float16)[start : start + 16]
        assert torch.equal(_run(x, (weight,)), weight[:, start : start + 16].T)


@KIND
def test_configs(kind: str) -> None:
    for depth in (1, 16, 33, 128, 384, 4096, 14336, 20480, 28672, MAX_GEMV_MMA_DEPTH - 1, MAX_GEMV_MMA_DEPTH):
        for rows, gated in ((1, False), (16, True)):
            configs = gemv_mma_configs(Product(rows, 4096, depth, torch.bfloat16, H200, gated), kind)
            assert configs
            assert len({str(config) for config in configs}) == len(configs)
            for config in configs:
                steps = -(-depth // (config.num_warps * STEP_COLUMNS[kind]))
                assert 1 <= config["AHEAD"] <= steps <= MAX_STEPS
                assert config.num_warps == 1 or (config.num_warps // 2) * STEP_COLUMNS[kind] < depth
    assert len(gemv_mma_configs(Product(1, 4096, 4096, torch.bfloat16, H200), kind)) >= 3


def test_configs_have_no_more_steps_than_registers_are_enough_for() -> None:
    def warps(rows: int, depth: int, kind: str) -> set[int]:
        configs = gemv_mma_configs(Product(rows, 4096, depth, torch.bfloat16, H200), kind)
        return {config.num_warps for config in configs}

    assert warps(8, 14336, "int4") == {4, 8}
    assert warps(16, 14336, "int4") == warps(16, 28672, "int4") == {8}, "of 16 warps, each has half the registers"
    assert warps(1, 4096, "none") == {4, 8}
    assert warps(1, 8192, "none") == {8}
    assert warps(1, 14336, "none") == warps(16, 28672, "none") == {16}
    assert warps(16, MAX_GEMV_MMA_DEPTH - 1, "none") == {16}
    assert warps(1, 4096, "int4") == {4, 8}
    assert warps(1, 8192, "int4") == warps(1, 8192, "int8") == {4, 8}, "2048 columns of x are enough for a warp"
    assert warps(1, 14336, "int4") == warps(1, 14336, "int8") == warps(1, 28672, "int4") == {8}


def test_what_the_product_of_a_dense_weight_does_not_take() -> None:
    why_not, x, weight = linear.impls["gluon_gemv"].why_not, _tensor(17, 40, seed=0), _tensor(9, 40, seed=1)
    off_gpu = "the inputs are on cpu, not on a CUDA device"
    assert why_not(x[:16], weight) == [off_gpu]
    assert why_not(x, weight) == [off_gpu, "x has 17 rows; the kernel takes up to 16"]
    assert "takes float16 and bfloat16" in why_not(x[:1].float(), weight.float())[-1]
    across = [(x[:9].t(), x[:, :9].t()), (x[:1], weight.t().contiguous().t()), (x[:1, ::2], weight[:, :20])]
    assert all("x or a weight is not contiguous along K" in why_not(*tensors)[1:] for tensors in across)
    deep = torch.zeros(1, MAX_GEMV_MMA_DEPTH + 1, dtype=torch.bfloat16)
    assert "K is above 32768" in why_not(deep, deep)[-1]
    assert why_not(deep[:, 1:], deep[:, 1:]) == [off_gpu]


def test_a_launch_names_what_it_needs() -> None:
    launches: list[Launch] = []
    with recording(launches.append, H200):
        gemv_mma(_tensor(1, 256, seed=0), *_weight(8, 256, "none"))
        data, scales, _, _ = _weight(40, 256, "int4")
        gemv_mma(_tensor(9, 256, seed=0), data, None, "silu", gated=True, kind="int4", scales=scales)
    dense, int4 = launches
    assert (dense.constants["UNITS"], dense.constants["BLOCK_M"], dense.grid) == (256, 8, (1,))
    assert (int4.constants["UNITS"], int4.constants["BLOCK_M"], int4.grid) == (32, 16, (3,))
    assert int4.args[1].dtype == torch.int32
    assert int4.options["launch_pdl"]


def test_the_weight_and_its_scales_are_asked_for_before_the_wait() -> None:
    """As far as it can be seen without a GPU: where the kernel loads and waits."""
    source = inspect.getsource(module)
    kernel = source[source.index("def gemv_mma_kernel") :]
    before, after = kernel.split("gdc_wait()", 1)
    assert "ask(" in before
    assert "gl.load(scales_ptr" in before
    assert "x_ptr," not in before.split("gdc_launch_dependents()")[1]
    assert "gl.store" not in before
    assert "x_ptr," in after


@pytest.mark.slow
def test_at_models_sizes_nothing_spills_or_moves_and_few_instructions_do() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot_gemv_mma"]
    run = subprocess.run(command, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    compiled = json.loads(run.stdout)
    assert len(compiled) > 100
    assert not [entry for entry in compiled if "error" in entry or entry["loops"]]
    deep = [entry for entry in compiled if (entry["kind"], entry["x"]) == ("int4", [1, 1, 14336])]
    assert max(entry["spills"] for entry in deep) <= 8, "two words, so that two programs of 8 warps run at once"
    assert not [entry for entry in compiled if entry["spills"] and entry not in deep]
    floats = [entry for entry in compiled if entry["x"][1] > 1 or entry["kind"] in ("none", "fp8")]
    assert max(entry["stores"] for entry in floats) <= 24, "sums alone go through shared memory, in the end"
    assert max(entry["stores"] for entry in compiled) <= 40, "and a row's digits once"
    first: dict[str, float] = {}  # of one row of x in bfloat16
    for entry in compiled:
        if (entry["capability"], entry["x"], entry["dtype"]) == (90, [1, 1, 4096], "torch.bfloat16"):
            first.setdefault(entry["kind"], entry["per_byte"])
    # An H200 has time for 7 to 8 while a byte arrives.
    assert first["none"] < 0.7
    assert first["int8"] < 1.0
    assert first["fp8"] < 3.2
    assert first["int4"] < 2.8
