"""A norm in the prologue of the kernels for few rows, in the interpreter: sizes, strides, statistics, rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import layer_norm, layer_norm_linear, linear, rms_norm, rms_norm_gated_mlp, rms_norm_linear
from burnish.ops._activations import activate
from burnish.ops._norms import layer_norm_reference

pytest.importorskip("triton")

from burnish.kernels.gemv import gemv, gemv_configs
from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.matmul_configs import Product
from burnish.kernels.norm_prologue import Norm, norm_constants
from burnish.kernels.skinny import fits_normed, skinny, skinny_configs

BOTH = [rms_norm_linear, layer_norm_linear]
KERNELS = {"gemv": gemv, "skinny": skinny}


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _norm(op: Op, depth: int, dtype: torch.dtype = torch.float16, eps: float = 1e-5) -> tuple[Any, ...]:
    vectors = (1 + _tensor(depth, seed=7, dtype=dtype), _tensor(depth, seed=8, dtype=dtype))
    return (vectors[0], eps) if op is rms_norm_linear else (*vectors, eps)


def _run(family: str, op: Op, *args: Any, config: Config | None = None) -> Tensor:
    """The kernel on the Op's arguments."""
    x, *norm, weight, bias, activation = op.bind(*args)
    rms = op is rms_norm_linear
    normed = Norm(norm[0], None if rms else norm[1], norm[-1], rms)
    return KERNELS[family](x, weight, bias, activation, norm=normed, config=config)


def _assert_right(family: str, op: Op, *args: Any, config: Config | None = None) -> None:
    result = _run(family, op, *args, config=config)
    assert_close(result, op.reference(*args), oracle(op.reference, *args))
    assert result.is_contiguous()


def _families(rows: int, dtype: torch.dtype = torch.float16) -> list[str]:
    return ["gemv"] * (rows <= 8) + ["skinny"] * (rows > 1 and dtype != torch.float32)


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16])
@pytest.mark.parametrize(
    ("columns", "depth", "dtype"),
    [(37, 96, torch.float16), (9, 130, torch.bfloat16), (5, 1, torch.float16), (3, 1100, torch.bfloat16)],
)
def test_sizes(op: Op, rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, depth, dtype=dtype) + 1, _tensor(columns, depth, seed=1, dtype=dtype)
    norm, bias = _norm(op, depth, dtype), _tensor(columns, seed=2, dtype=dtype)
    for family in _families(rows):
        impl = op.impls[f"triton_{family}"]
        assert impl.why_not(x, *norm, weight, bias) == ["the inputs are on cpu, not on a CUDA device"]
        args = (x, *norm, weight, bias, "gelu")
        _assert_right(family, op, *args)
        assert torch.equal(impl.fn(*args), _run(family, op, *args))


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("rows", [1, 8])
def test_float32(op: Op, rows: int) -> None:
    x, weight = randn(rows, 3000), _tensor(5, 3000, seed=1, dtype=torch.float32)
    _assert_right("gemv", op, x, *_norm(op, 3000, torch.float32), weight)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_mean_that_is_large_against_the_spread(rows: int, spread: float) -> None:
    """Rows longer than what is loaded at once, too; the numbers are float32's, so that no rounding hides them."""
    depth = 5000
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(0)) * spread + 1000 * spread
    args = (x, None, None, 0.0, _tensor(5, depth, seed=1, dtype=torch.float32))
    _assert_right("gemv", layer_norm_linear, *args)
    constants = norm_constants(Norm(None, None, 0.0, False), 7, depth, 4)
    assert constants["NORM_BLOCK"] * constants["NORM_AT_ONCE"] < depth


@pytest.mark.parametrize("first", [1000.0, -30.0])
def test_a_row_that_begins_unlike_the_rest(first: float) -> None:
    """Its first entries' mean, which values are centred by, is far from the row's."""
    x = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    x[:, :2048] += first
    args = (x, None, None, 1e-5, _tensor(5, 5000, seed=1, dtype=torch.float32))
    _assert_right("gemv", layer_norm_linear, *args)


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_normalized_values_are_rounded_as_the_norms_are(family: str, op: Op, dtype: torch.dtype) -> None:
    """Differences of pairs that are nearly alike show what was rounded before the product."""
    x = randn(4, 32).repeat_interleave(2, dim=1)
    x[:, 1::2] *= 1 + 1 / 64
    weight = torch.eye(64)[::2] - torch.eye(64)[1::2]
    x, weight, norm = x.to(dtype), weight.to(dtype), _norm(op, 64, dtype)
    separate = rms_norm if op is rms_norm_linear else layer_norm
    expected = KERNELS[family](separate.impls["triton"].fn(x, *norm), weight)
    # The sums of squares differ in their order, which may round a value at a tie the other way.
    assert (_run(family, op, x, *norm, weight) != expected).sum() <= 1


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("family", KERNELS)
def test_strided_inputs_are_read_in_place(op: Op, family: str) -> None:
    packed, weight = randn(2, 3, 3 * 64, dtype=torch.float16), _tensor(40, 128, seed=1)[:, 64:]
    bias, (*vectors, eps) = _tensor(80, seed=2)[::2], _norm(op, 128)
    norm = (*(v[::2] for v in vectors), eps)
    for x in (packed[..., 64:128], packed[:, :, ::3], packed.transpose(0, 1)[..., :64]):
        _assert_right(family, op, x, *norm, weight, bias, "silu")


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("family", KERNELS)
def test_norms_of_other_dtypes_and_without_weight(op: Op, family: str) -> None:
    x, weight = randn(3, 100, dtype=torch.float16) + 1, _tensor(40, 100, seed=1)
    *vectors, eps = _norm(op, 100, torch.float32)
    _assert_right(family, op, x, *vectors, eps, weight)
    _assert_right(family, op, x, *(None for _ in vectors), eps, weight)
    if op is layer_norm_linear:
        _assert_right(family, op, x, vectors[0], None, eps, weight)
        _assert_right(family, op, x, None, vectors[1].bfloat16(), eps, weight)


@pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)
@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_sum_have_the_statistics_of_whole_rows(op: Op, parts: int, tma: int) -> None:
    x = torch.cat([randn(5, 128), 20 * randn(5, 120, seed=1)], dim=1).half()
    args = (x, *_norm(op, 248), _tensor(70, 248, seed=1), _tensor(70, seed=2), "gelu")
    config = Config.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLIT_K=parts, TMA=tma)
    _assert_right("skinny", op, *args, config=config)


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("rms", [True, False])
def test_gates(family: str, rms: bool) -> None:
    """Of a layer norm too, which no Op has."""
    x, weight, bias = randn(6, 104, dtype=torch.float16) + 2, _tensor(140, 104, seed=1), _tensor(140, seed=2)
    scale, shift = 1 + _tensor(104, seed=3), _tensor(104, seed=4)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = rms_norm_linear.reference(x, scale, 1e-5, weight, bias) if rms else None
        if normed is None:
            normed = linear.reference(layer_norm_reference(x, scale, shift, 1e-5), weight, bias)
        gate, up = normed.chunk(2, dim=-1)
        return activate(gate, "silu") * up

    result = KERNELS[family](
        x, weight, bias, "silu", gated=True, norm=Norm(scale, None if rms else shift, 1e-5, rms)
    )  # fmt: skip
    args = (x, weight, bias, scale, shift)
    assert_close(result, reference(*args), oracle(reference, *args))


@pytest.mark.parametrize("family", KERNELS)
def test_a_row_of_nan_or_infinity_spoils_no_other(family: str) -> None:
    x, weight = randn(3, 64, dtype=torch.float16), _tensor(20, 64, seed=1)
    x[1, 5] = float("nan")
    for op in BOTH:
        result = _run(family, op, x, *_norm(op, 64), weight)
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()
    x[1, 5] = float("inf")
    assert _run(family, layer_norm_linear, x, *_norm(layer_norm_linear, 64), weight)[1].isnan().all()


@pytest.mark.parametrize("family", KERNELS)
def test_without_a_norm_nothing_of_it_is_compiled(family: str) -> None:
    x, weight = randn(4, 64, dtype=torch.float16), _tensor(20, 64, seed=1)
    launches: list[Launch] = []
    with recording(launches.append, Target((9, 0), 132)):
        KERNELS[family](x, weight)
        KERNELS[family](x, weight, norm=Norm(x[0], None, 1e-5, True))
    plain, normed = launches
    assert plain.args[-5:] == (None,) * 5
    assert plain.constants["NORM"] == "none"
    assert all(value == 1 for name, value in plain.constants.items() if name.startswith("NORM_"))
    assert normed.args[-4:] == (None, 1, 1, 1e-5)
    assert normed.constants["NORM"] == "rms"


def test_reasons() -> None:
    scale, weight = _tensor(32, seed=1), _tensor(20, 32, seed=2)
    for name, op in (("triton_gemv", rms_norm_linear), ("triton_skinny", layer_norm_linear)):
        why_not = partial(op.impls[name].why_not, eps=1e-5, weight=weight)
        vectors = {} if op is rms_norm_linear else {"norm_bias": None}
        many = why_not(_tensor(17, 32, seed=0), scale, **vectors)
        assert any("x has 17 rows, each of which every program normalizes" in reason for reason in many)
        wide = why_not(_tensor(4, 32, seed=0), scale.double(), **vectors)
        assert wide[1:] == [
            "the norm's weight or bias is torch.float64; the kernel takes float16, bfloat16 and float32"
        ]
    k_major, down = _tensor(32, 20, seed=3).t(), _tensor(5, 10, seed=4)
    reasons = rms_norm_gated_mlp.impls["triton_gemv"].why_not(scale[None], None, 1e-5, k_major, down)
    assert "contiguous along K" in reasons[-1]


@pytest.mark.parametrize("target", [Target((8, 0), 108), Target((8, 6), 84), Target((9, 0), 132), Target((10, 0), 148)])
def test_there_are_configs_with_room_for_a_norm(target: Target) -> None:
    for rows in (2, 16):
        for columns, depth in ((1, 1), (768, 3072), (4096, 16384), (33, 130)):
            for gated in (False, True):
                product = Product(rows, columns, depth, torch.bfloat16, target, gated)
                assert any(fits_normed(config, product) for config in skinny_configs(product))
    consumer = Product(16, 4096, 4096, torch.bfloat16, Target((8, 6), 84))
    assert not all(fits_normed(config, consumer) for config in skinny_configs(consumer))


def test_every_config_loads_whole_rows_or_many_blocks_at_once() -> None:
    norm = Norm(None, None, 0.0, True)
    for rows in (1, 2, 8):
        for config in gemv_configs(Product(rows, 4096, 4096, torch.bfloat16, Target((9, 0), 132))):
            constants = norm_constants(norm, rows, 4096, config.num_warps)
            assert constants["NORM_ROWS"] * constants["NORM_BLOCK"] == 32 * config.num_warps * 8
            assert constants["NORM_AT_ONCE"] == min(16, 4096 // constants["NORM_BLOCK"])


@pytest.mark.slow
def test_every_config_compiles_at_models_sizes() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot_prologue"]
    run = subprocess.run(command, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    compiled = json.loads(run.stdout)
    assert len(compiled) > 100
    most = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory
    assert not [
        entry
        for entry in compiled
        if "error" in entry or entry["spills"] or entry["shared"] > most[entry["capability"]]
    ]
