"""Product, addition and norm in one Gluon kernel, in the emulator: programs that wait for each other's statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS, Op

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")

from burnish.kernels import counters
from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.linear_norm_wgmma import linear_norm_wgmma, linear_norm_wgmma_configs
from burnish.kernels.matmul_configs import Product
from tests.kernels.gluon_emulator import emulate

HALF = torch.float16
H200, FEW_SMS = Target((9, 0), 132), Target((9, 0), 9)  # two gangs of four tiles, which have several rows of them each
CONFIGS = linear_norm_wgmma_configs(Product(2048, 450, 328, HALF, H200))
ROWS, COLUMNS, DEPTH = 700, 456, 328  # as many steps over K as there are stages, for some configs


def inputs(mean: float = 0.0, columns: int = COLUMNS) -> tuple[Tensor, ...]:
    """x, weight, bias, residual and the norm's vectors; sizes that no block divides, but perhaps the columns."""
    x, residual = randn(1, ROWS, DEPTH, dtype=HALF, seed=0), randn(1, ROWS, columns, dtype=HALF, seed=1) + mean
    weight = randn(columns, DEPTH, dtype=HALF, seed=2) / math.sqrt(DEPTH)
    return x, weight, randn(columns, dtype=HALF, seed=3), residual, *(randn(columns, seed=seed) for seed in (4, 5))


def emulated(op: Op, config: Config, given: tuple[Any, ...], keep_sum: bool, live: int | None = None) -> Any:
    """The results, poisoned before, of a kernel that has to leave what it counts with at zero."""
    launches: list[Launch] = []
    told = {} if live is None else {"live_rows": torch.tensor([live], dtype=torch.int32)}
    with recording(launches.append, FEW_SMS):
        normed, total = op.impls["gluon_fused"].fn(*given, 1e-6, keep_sum, config=config, **told)
    for result in (normed, total):
        result.fill_(math.nan)
    emulate(launches[0])
    assert all(not buffer.any() for buffer in counters._buffers.values())
    return normed, total


@pytest.mark.parametrize("columns", [COLUMNS, 384])  # some tiles hang over, or none
@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gangs_with_several_rows_of_tiles(config: Config, rms: bool, keep_sum: bool, columns: int) -> None:
    op = OPS["linear_add_rms_norm" if rms else "linear_add_layer_norm"]
    given = inputs(columns=columns)[: 5 if rms else 6]
    bound = op.bind(*given, 1e-6, keep_sum)
    result = emulated(op, config, given, keep_sum)
    assert_close(result, op.reference(*bound), oracle(op.reference, *bound))


@pytest.mark.parametrize("columns", [COLUMNS, 384])
def test_rows_whose_mean_is_large_against_their_spread(columns: int) -> None:
    op, given = OPS["linear_add_layer_norm"], inputs(300.0, columns)
    bound = op.bind(*given, 1e-6)
    assert_close(emulated(op, CONFIGS[0], given, True), op.reference(*bound), oracle(op.reference, *bound))


@pytest.mark.parametrize("live", [0, 1, 128, 387, ROWS])
@pytest.mark.parametrize("config", CONFIGS[-2:], ids=str)
def test_rows_beyond_the_live_ones_are_left_alone(config: Config, live: int) -> None:
    op, (x, weight, bias, residual, *vectors) = OPS["linear_add_layer_norm"], inputs()
    short = op.bind(x[:, :live].clone(), weight, bias, residual[:, :live].clone(), *vectors, 1e-6)
    x[:, live:], residual[:, live:] = math.nan, math.nan
    results = emulated(op, config, (x, weight, bias, residual, *vectors), True, live)
    assert all(result[:, live:].isnan().all() for result in results)
    if live:
        found = tuple(result[:, :live] for result in results)
        assert_close(found, op.reference(*short), oracle(op.reference, *short))


def test_it_is_called_as_the_op_is() -> None:
    op, given, launches = OPS["linear_add_layer_norm"], inputs(), list[Launch]()
    fn = op.impls["gluon_fused"].fn
    with recording(launches.append, H200):
        _, total = fn(*given)
        _, nothing = fn(*given, keep_sum=False, eps=0.25, config=CONFIGS[1])
    assert total.shape == given[3].shape
    assert nothing.shape == (0,)
    assert [launch.args[16] for launch in launches] == [1e-5, 0.25]
    assert launches[1].constants["BLOCK_K"] == CONFIGS[1]["BLOCK_K"]


def test_as_many_programs_as_run_at_once() -> None:
    launches: list[Launch] = []
    x, weight, bias, residual, *vectors = inputs()
    with recording(launches.append, H200):
        for rows in (100, ROWS, 6000):
            given = (t[:, :1].expand(1, rows, -1).contiguous() for t in (x, residual))
            x_, residual_ = given
            linear_norm_wgmma(x_, weight, bias, residual_, *vectors, 1e-6, False, False, CONFIGS[0])
    assert [launch.grid for launch in launches] == [(4,), (24,), (132,)]


def test_rows_of_more_tiles_than_multiprocessors_are_refused() -> None:
    assert not linear_norm_wgmma_configs(Product(2048, 8192, 64, HALF, Target((9, 0), 16)))
