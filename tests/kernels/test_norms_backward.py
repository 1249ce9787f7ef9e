"""The kernels of the norms' backward passes in Triton's interpreter: every way to run them, sizes, strides, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import layer_norm_backward, rms_norm_backward

pytest.importorskip("triton")

from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.norms_backward import norm_backward_configs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)
OPS = pytest.mark.parametrize("op", [layer_norm_backward, rms_norm_backward], ids=lambda op: op.name)


def arguments(op: Op, *shape: int, dtype: torch.dtype = BF16, eps: float = 1e-5, **changes: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {name: randn(*shape, dtype=dtype, seed=s) for s, name in enumerate(("grad", "x"))}
    given |= {name: randn(shape[-1], dtype=dtype, seed=s) for s, name in enumerate(("weight", "bias"), 2)}
    given |= {"eps": eps, **changes}
    bound: tuple[Any, ...] = op.bind(**{k: v for k, v in given.items() if k in op.signature.parameters})
    return bound


def run(op: Op, args: tuple[Any, ...], config: Config | None = None) -> tuple[Tensor, ...]:
    """On fresh memory that starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found: tuple[Tensor, ...] = op.impls["triton"].fn(*args, **({} if config is None else {"config": config}))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def assert_right(op: Op, args: tuple[Any, ...], config: Config | None = None) -> None:
    result = run(op, args, config)
    assert_close(result, op.reference(*args), oracle(op.reference, *args))
    assert all(t.is_contiguous() for t in result)


def launched(op: Op, args: tuple[Any, ...], target: Target = H200) -> list[Launch]:
    launches: list[Launch] = []
    with recording(launches.append, target):
        op.impls["triton"].fn(*args)
    return launches


CONFIGS = [
    Config.of(num_warps=1, num_stages=1, ROWS=1, PER_SM=1, AGAIN=0),
    Config.of(num_warps=4, num_stages=3, ROWS=2, PER_SM=2, AGAIN=0),
    Config.of(num_warps=4, num_stages=2, ROWS=16, PER_SM=1, AGAIN=0),
    Config.of(num_warps=4, num_stages=1, ROWS=1, PER_SM=1, AGAIN=1),
]


@OPS
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_kind_of_config_takes_every_row_once(op: Op, config: Config) -> None:
    extra = randn(19, 72, dtype=BF16, seed=7)
    assert_right(op, arguments(op, 19, 72, grad_sum=extra, weight=randn(72, seed=2)), config)


@OPS
@pytest.mark.parametrize("columns", [3, 33, 128, 768, 4096, 16384])
def test_sizes_far_from_zero_with_a_tiny_eps(op: Op, columns: int) -> None:
    x = randn(3, columns, dtype=FP16, seed=1) * 0.5 - 20
    assert_right(op, arguments(op, 3, columns, dtype=FP16, x=x, eps=1e-12))


@OPS
def test_a_row_of_zeros_with_a_tiny_eps(op: Op) -> None:
    """Its slope is 1 / sqrt(eps), a million."""
    x = randn(3, 96, seed=1)
    x[1] = 0
    assert_right(op, arguments(op, 3, 96, dtype=FP32, x=x, eps=1e-12))


@OPS
@pytest.mark.parametrize(("dtype", "other"), [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP16), (BF16, FP16)])
def test_weights_of_another_dtype(op: Op, dtype: torch.dtype, other: torch.dtype) -> None:
    args = arguments(op, 5, 96, dtype=dtype, weight=randn(96, dtype=other, seed=2))
    assert_right(op, args)
    gradients = [dtype, other, dtype][: 3 if op is layer_norm_backward else 2]
    assert [t.dtype for t in run(op, args)][: len(gradients)] == gradients


@OPS
@pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(op: Op, asked: tuple[bool, bool]) -> None:
    names = ("weight_grad", "bias_grad")
    args = arguments(op, 5, 96, **{n: a for n, a in zip(names, asked, strict=True) if n in op.signature.parameters})
    assert_right(op, args)
    for absent in ({"weight": None}, {"bias": None}, {"weight": None, "bias": None}):
        assert_right(op, arguments(op, 5, 96, **absent))
    if op is rms_norm_backward:
        assert len(launched(op, args)) == 1 + asked[0]  # without parts there is nothing to add up


FURTHER = {"narrow": FP16, "dx_sum": True, "normed": BF16}


@OPS
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("absent", [(), ("bias",), ("weight",), ("weight", "bias", "grad_sum")], ids=str)
def test_all_further_results(op: Op, config: Config, absent: tuple[str, ...]) -> None:
    given: dict[str, Any] = {"x": randn(19, 72, seed=1) * 0.5 - 20, "grad_sum": randn(72, 19, seed=7).t(), **FURTHER}
    given |= {"weight": randn(144, seed=2)[::2], "bias": randn(144, dtype=FP16, seed=3)[::2]}
    args = arguments(op, 19, 72, **given | dict.fromkeys(absent))
    assert_right(op, args, config)
    dx, *_, narrow, total, normed = run(op, args, config)
    assert [t.dtype for t in (dx, narrow, total, normed)] == [FP32, FP16, FP32, BF16]
    assert torch.equal(narrow, dx.half())


@OPS
@pytest.mark.parametrize("alone", FURTHER)
def test_one_further_result_alone(op: Op, alone: str) -> None:
    for frozen in (False, True):
        names = {"weight_grad", "bias_grad"} & set(op.signature.parameters) if frozen else set()
        args = arguments(op, 2, 5, 96, dtype=FP16, **{alone: FURTHER[alone], **dict.fromkeys(names, False)})
        assert_right(op, args)
        assert [t.numel() > 0 for t in run(op, args)[-3:]] == [name == alone for name in FURTHER]
        sums = (0 if frozen else 2 if op is layer_norm_backward else 1) + (alone == "dx_sum")
        assert [launch.grid[1] for launch in launched(op, args)[1:]] == ([sums] if sums else [])


@OPS
def test_many_parts_of_all_sums(op: Op) -> None:
    config = Config.of(num_warps=1, num_stages=1, ROWS=1, PER_SM=100, AGAIN=0)
    args = arguments(op, 300, 20, dtype=FP32, **FURTHER)
    assert_right(op, args, config)
    assert all(torch.equal(a, b) for a, b in zip(run(op, args), run(op, args), strict=True))


def slices() -> dict[str, Tensor]:
    """Inputs of shape (2, 3, 4, 48) that are not contiguous; each is taken as it lies."""
    return {
        "of wider rows": randn(2, 3, 4, 144)[..., 48:96],
        "heads before positions": randn(2, 4, 3, 48).transpose(1, 2),
        "three strides": randn(2, 6, 9, 96)[:, ::2, ::2, :48][:, :, :4],
        "one row for all": randn(48).expand(2, 3, 4, 48),
    }


@OPS
@pytest.mark.parametrize("label", slices())
@pytest.mark.parametrize("name", ["grad", "x", "grad_sum"])
def test_strided_rows_are_taken_in_place(op: Op, name: str, label: str) -> None:
    strided = slices()[label]
    args = arguments(op, 2, 3, 4, 48, dtype=FP32, **{name: strided})
    assert_right(op, args)
    assert launched(op, args)[0].args[{"grad": 0, "x": 1, "grad_sum": 4}[name]] is strided


@OPS
def test_rows_that_need_a_copy(op: Op) -> None:
    number = torch.tensor(0.5).expand(5, 6)  # the gradient of a sum
    assert_right(op, arguments(op, 5, 6, dtype=FP32, grad=number))
    assert_right(op, arguments(op, 5, 6, dtype=FP32, x=randn(6, 5).t(), grad_sum=number))
    four_strides = randn(4, 6, 6, 6, 12)[::2, ::2, ::2, ::2, :6]
    assert_right(op, arguments(op, *four_strides.shape, dtype=FP32, x=four_strides))
    assert_right(op, arguments(op, 40, dtype=FP32, weight=randn(80)[::2]))


@OPS
def test_the_same_bits_each_time(op: Op) -> None:
    args = arguments(op, 40, 72)
    assert all(torch.equal(a, b) for a, b in zip(run(op, args), run(op, args), strict=True))


@OPS
def test_many_parts_are_added_up(op: Op) -> None:
    """More programs than the second kernel reads at a time."""
    config = Config.of(num_warps=1, num_stages=1, ROWS=1, PER_SM=100, AGAIN=0)
    assert_right(op, arguments(op, 300, 20), config)


@OPS
def test_nan_stays_in_its_row_and_column(op: Op) -> None:
    grad = randn(4, 40, dtype=BF16)
    grad[2, 7] = float("nan")
    dx, dweight, *_ = run(op, arguments(op, 4, 40, grad=grad))
    assert dx.isnan().any(1).tolist() == [False, False, True, False]
    assert dweight.isnan().nonzero().flatten().tolist() == [7]


@OPS
@pytest.mark.parametrize(("rows", "most"), [(1, 1), (300, 132 * 2), (16384, 132 * 2), (1 << 20, 132 * 2)])
def test_programs_are_as_many_as_share_the_rows(op: Op, rows: int, most: int) -> None:
    x = torch.empty(1, 4096, dtype=BF16).expand(rows, 4096)
    first, second = launched(op, arguments(op, 1, 4096, grad=x, x=x))
    assert first.grid[0] <= most
    assert -(-rows // first.grid[0]) == -(-rows // most)
    assert second.grid == (4096 // 16, 2 if op is layer_norm_backward else 1)


@pytest.mark.parametrize("rows", [1, 128, 4096, 16384])
@pytest.mark.parametrize("columns", [33, 128, 768, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("crowded", [False, True])
def test_configs_are_few_distinct_and_fit(rows: int, columns: int, dtype: torch.dtype, crowded: bool) -> None:
    configs = norm_backward_configs(rows, columns, dtype, True, H200, crowded)
    assert 1 <= len(configs) <= 6
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        threads = 32 * config.num_warps
        assert config["ROWS"] * columns <= threads * 32
        assert config["PER_SM"] * threads <= 1024
        staged = config["PER_SM"] * (config.num_stages - 1) * 3 * config["ROWS"] * columns * dtype.itemsize
        assert staged <= 144 << 10


def test_programs_leave_each_other_registers() -> None:
    """96 a thread with more to add up, of which 5 programs have room on a multiprocessor; 72 without, for 6."""
    for crowded, programs in ((False, 6), (True, 5)):
        assert norm_backward_configs(12288, 768, FP32, True, H200, crowded)[0]["PER_SM"] == programs


def test_reasons_against() -> None:
    args = arguments(rms_norm_backward, 2, 16385)
    reasons = rms_norm_backward.impls["triton"].why_not(*args)
    assert "rows of 16385 entries do not fit a program's registers; 16384 do" in reasons
