"""The normalizing kernels on what their Ops' samples leave out: every way to run them, sizes, strides, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import add_layer_norm, add_rms_norm, embedding, embedding_layer_norm, layer_norm, rms_norm

pytest.importorskip("triton")

from burnish.kernels import norms
from burnish.kernels.launch import Config, Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)
OPS = [layer_norm, rms_norm, add_layer_norm, add_rms_norm]


def assert_right(op: Op, *args: Any, config: Config | None = None) -> None:
    """The kernel's numbers on fresh memory that starts as NaN, and contiguous results."""
    bound = op.bind(*args)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = op.impls["triton"].fn(*bound) if config is None else op.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, op.reference(*bound), oracle(op.reference, *bound))
    assert all(t.is_contiguous() for t in (result if isinstance(result, tuple) else (result,)))


def arguments(op: Op, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """What `op` takes of these."""
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return tuple(given[name] for name in op.signature.parameters if name in given)


def launched(run: Callable[[], object]) -> Launch:
    launches: list[Launch] = []
    with recording(launches.append, H200):
        run()
    (only,) = launches
    return only


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        Config.of(num_warps=1, ROWS=1, PER_SM=0),
        Config.of(num_warps=4, ROWS=4, PER_SM=0),
        Config.of(num_warps=4, num_stages=2, ROWS=1, PER_SM=2),
        Config.of(num_warps=4, num_stages=3, ROWS=2, PER_SM=1),
    ],
    ids=str,
)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@CONFIGS
def test_every_kind_of_config_takes_every_row_once(op: Op, config: Config) -> None:
    x, residual = (randn(19, 72, dtype=BF16, seed=s) for s in (0, 1))
    weight, bias = randn(72, seed=2), randn(72, dtype=BF16, seed=3)
    assert_right(op, *arguments(op, x, residual, weight, bias), config=config)


@pytest.mark.parametrize("op", [add_layer_norm, add_rms_norm], ids=lambda op: op.name)
@CONFIGS
def test_without_the_sum_it_is_rounded_all_the_same(op: Op, config: Config) -> None:
    x, residual = (randn(19, 72, dtype=BF16, seed=s) for s in (0, 1))
    *args, _ = op.bind(*arguments(op, x, residual, randn(72, seed=2), None))
    assert_right(op, *args, False, config=config)
    run = op.impls["triton"].fn
    assert torch.equal(run(*args, False, config=config)[0], run(*args, True, config=config)[0])
    with_sum, without = (launched(lambda keep=keep: run(*args, keep, config=config)) for keep in (True, False))  # type: ignore[misc]
    assert [kept.args[5] is None for kept in (with_sum, without)] == [False, True]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("columns", [1, 33, 128, 768, 4096, 16384])
def test_sizes_far_from_zero_with_a_tiny_eps(op: Op, columns: int) -> None:
    x, residual = (randn(3, columns, dtype=FP16, seed=s) for s in (0, 1))
    x = x * 0.5 - 20
    assert_right(op, *arguments(op, x, residual, randn(columns, dtype=FP16), None), 1e-12)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("dtype", "other"), [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP16), (BF16, FP16)])
def test_weights_of_another_dtype(op: Op, dtype: torch.dtype, other: torch.dtype) -> None:
    x, residual = (randn(5, 96, dtype=dtype, seed=s) for s in (0, 1))
    assert_right(op, *arguments(op, x, residual, randn(96, dtype=other, seed=2), randn(96, dtype=dtype, seed=3)))


def slices() -> dict[str, Tensor]:
    """Inputs of shape (2, 3, 4, 48) that are not contiguous; each is taken as it lies, or why not."""
    return {
        "of wider rows": randn(2, 3, 4, 144)[..., 48:96],
        "every other row": randn(2, 3, 8, 48)[:, :, ::2],
        "heads before positions": randn(2, 4, 3, 48).transpose(1, 2),
        "three strides": randn(2, 6, 9, 96)[:, ::2, ::2, :48][:, :, :4],
        "one row for all": randn(48).expand(2, 3, 4, 48),
        "one matrix for each batch": randn(2, 1, 4, 48).expand(2, 3, 4, 48),
    }


@pytest.mark.parametrize("label", slices())
def test_strided_rows_are_taken_in_place(label: str) -> None:
    x, residual, weight = slices()[label], randn(2, 3, 4, 48, seed=1), randn(48, seed=2)
    assert_right(layer_norm, x, weight, weight)
    assert_right(add_rms_norm, x, residual, weight)
    assert_right(add_rms_norm, residual, x, weight)
    assert launched(lambda: norms.rms_norm(x, weight, 1e-6)).args[0] is x
    only = launched(lambda: norms.add_rms_norm(residual, x, weight, 1e-6))
    assert only.args[0] is residual
    assert only.args[1] is x


def test_rows_that_need_a_copy() -> None:
    weight = randn(6, seed=2)
    assert_right(layer_norm, randn(5, 6, 4).transpose(1, 2), weight, None)
    assert_right(rms_norm, randn(5, 1).expand(5, 6), weight)
    four_strides = randn(4, 6, 6, 6, 12)[::2, ::2, ::2, ::2, :6]
    assert_right(rms_norm, four_strides, weight)
    assert_right(add_layer_norm, four_strides, randn(*four_strides.shape, seed=1), weight, weight)


def test_weights_are_never_copied() -> None:
    """They are read before the kernels before this one are done."""
    x, weight, bias = randn(5, 6), randn(12, seed=3)[::2], randn(1, seed=4).expand(6)
    assert_right(layer_norm, x, weight, bias)
    assert_right(embedding_layer_norm, *embeddings(weight=randn(80)[::2]))
    only = launched(lambda: norms.layer_norm(x, weight, bias, 1e-6))
    assert only.args[2] is weight
    assert only.args[3] is bias


def test_one_vector() -> None:
    assert_right(layer_norm, randn(40), randn(40, seed=1), None)
    assert_right(add_rms_norm, randn(40), randn(80, seed=1)[::2], None)


@pytest.mark.parametrize(
    ("tensors", "sizes", "strides"),
    [
        ([torch.empty(2, 3, 4)], (6,), [(4, 1)]),
        ([torch.empty(2, 3, 8)[..., :4]], (6,), [(8, 1)]),
        ([torch.empty(3, 2, 4).transpose(0, 1)], (2, 3), [(4, 8, 1)]),
        ([torch.empty(3, 2, 4).transpose(0, 1), torch.empty(2, 3, 4)], (2, 3), [(4, 8, 1), (12, 4, 1)]),
        ([torch.empty(2, 1, 3, 8)[..., :4], torch.empty(2, 1, 3, 4)], (6,), [(8, 1), (4, 1)]),
        ([torch.empty(4)[::2]], (1,), [(2, 2)]),
    ],
)
def test_leading_dimensions_collapse(
    tensors: list[Tensor], sizes: tuple[int, ...], strides: list[tuple[int, ...]]
) -> None:
    assert norms.collapse(*tensors) == (sizes, strides)


@pytest.mark.parametrize("rows", [1, 128, 4096, 16384])
@pytest.mark.parametrize("columns", [33, 128, 768, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_configs_are_few_distinct_and_fill_their_threads(rows: int, columns: int, dtype: torch.dtype) -> None:
    configs = norms.norm_configs(rows, columns, dtype, True, H200)
    assert 1 <= len(configs) <= 8
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        assert config["ROWS"] * columns <= config.num_warps * 32 * 32  # entries that one thread holds


def embeddings(**changes: Any) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "ids": torch.randint(50, (2, 5), generator=generator),
        "word": randn(50, 40, dtype=BF16),
        "position_ids": torch.arange(5)[None],
        "position": randn(9, 40, dtype=BF16, seed=1),
        "type_ids": torch.randint(2, (2, 5), generator=generator),
        "type": randn(2, 40, dtype=BF16, seed=2),
        "weight": randn(40, seed=3),
        "bias": randn(40, dtype=BF16, seed=4),
        **changes,
    }
    return tuple(given.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"type_ids": None, "type": None, "bias": None},
        {"position_ids": torch.arange(10, dtype=torch.int32).view(5, 2).t() % 9},
        {"ids": torch.arange(20).view(2, 10)[:, ::2], "type_ids": torch.ones(1, 1, dtype=torch.int32).expand(2, 5)},
        {"word": randn(50, 80, dtype=BF16)[:, :40], "position": randn(18, 40, dtype=BF16)[::2]},
    ],
    ids=["all", "no types", "int32 positions, transposed", "strided and expanded", "slices of tables"],
)
def test_embeddings(changes: dict[str, Any]) -> None:
    args = embeddings(**changes)
    assert_right(embedding_layer_norm, *args)
    assert_right(embedding, *args[:4])


@pytest.mark.parametrize("wrong", [50, -1])
def test_an_index_out_of_range_is_seen(wrong: int) -> None:
    args = embeddings(ids=torch.tensor([[0, 1, wrong, 49, 4]] * 2))
    rows = embedding_layer_norm.impls["triton"].fn(*args)
    assert rows.isnan().all(-1).tolist() == [[False, False, True, False, False]] * 2
    assert not rows[:, [0, 1, 3, 4]].isnan().any()
    assert embedding.impls["triton"].fn(*args[:4]).isnan().all(-1).equal(rows.isnan().all(-1))


def test_reasons_against() -> None:
    wide = torch.empty(2, 16385, device="meta")
    assert "rows of 16385 entries do not fit a program's registers; 16384 do" in rms_norm.impls["triton"].why_not(wide)
    x, weight = randn(2, 8), randn(8).double()
    (reason,) = [r for r in layer_norm.impls["triton"].why_not(x, weight) if "CUDA" not in r]
    assert reason == "weight or bias is torch.float64; the kernels take float16, bfloat16 and float32"
    args = embeddings(word=randn(40, 50, dtype=BF16).t(), ids=torch.empty(2, 0, dtype=torch.int64))
    reasons = [r for r in embedding_layer_norm.impls["triton"].why_not(*args) if "CUDA" not in r]
    assert reasons == ["ids is empty", "word is not stored row by row (its strides are (1, 50))"]
