"""The kernels of cross entropy on what their Ops' samples leave out: every way to run them, sizes, odd targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Op
from burnish.ops import cross_entropy, cross_entropy_with_gradient, linear_cross_entropy_with_gradients, scale_gradient
from burnish.ops._cross_entropy import targets
from burnish.ops._linear_cross_entropy import Chunks
from tests.slow import slow

pytest.importorskip("triton")

from burnish.kernels import cross_entropy as kernels
from burnish.kernels.launch import Config, Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, H200 = torch.device("cpu"), Target((9, 0), 132)


def assert_right(op: Op, *args: Any, config: Any = None, **kwargs: Any) -> None:
    """The kernel's numbers on fresh memory that starts as NaN."""
    bound = op.bind(*args, **kwargs)
    impl = op.impls["torch_triton" if op.name.startswith("linear") else "triton"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = impl.fn(*bound) if config is None else impl.fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, op.reference(*bound), oracle(op.reference, *bound))


@pytest.mark.parametrize("op", [cross_entropy, cross_entropy_with_gradient], ids=lambda op: op.name)
@pytest.mark.parametrize(
    "config",
    [
        Config.of(num_warps=1, N=4, E=8, HINTS=0, PER_SM=1),
        Config.of(num_warps=4, N=32, E=8, HINTS=1, PER_SM=2),
        Config.of(num_warps=4, N=64, E=4, HINTS=1, PER_SM=1),
        Config.of(num_warps=2, N=512, E=8, HINTS=0, PER_SM=32),
    ],
    ids=str,
)
def test_every_kind_of_config_takes_every_row_once(op: Op, config: Config) -> None:
    for size in (1, 32, 257, 512):
        logits = randn(9, size, dtype=BF16, seed=size)
        every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 9.0, "reduction": "none", "ignore_index": -1}
        assert_right(op, logits, targets(9, size, CPU, 1, -1), config=config, **every)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 700),
    st.sampled_from([BF16, FP32]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 1e-3]),
    st.sampled_from([None, 12.0]),
    st.sampled_from(["mean", "sum", "none"]),
)
def test_any_size_and_options(
    rows: int, size: int, dtype: torch.dtype, smoothing: float, z: float, softcap: float | None, reduction: str
) -> None:
    logits, target = randn(rows, size, dtype=dtype, seed=size), targets(rows, size, CPU, size)
    target[0] = size - 1
    assert_right(cross_entropy_with_gradient, logits, target, None, -100, smoothing, z, softcap, reduction)


@pytest.mark.parametrize(
    ("rows", "size", "dtype"), [(2, 50257, BF16), slow(2, 128256, BF16), slow(2, 50257, FP32), slow(3, 50304, FP16)]
)
def test_vocabularies_with_every_config(rows: int, size: int, dtype: torch.dtype) -> None:
    logits, target = randn(rows, size, dtype=dtype), targets(rows, size, CPU, 0)
    for config in kernels.cross_entropy_configs(rows, size, dtype, True, H200):
        assert_right(cross_entropy_with_gradient, logits, target, config=config, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_logits_far_from_zero(dtype: torch.dtype) -> None:
    logits = (randn(6, 257, outliers=0.0) + torch.tensor([1e4, -1e4, 0, 1e4, 3e4, -3e4])[:, None]).to(dtype)
    logits[3, ::2] = -1e4
    assert_right(cross_entropy_with_gradient, logits, torch.arange(6), reduction="none")


def test_masked_logits() -> None:
    logits, target = randn(3, 300), torch.tensor([0, 2, 4])
    logits[:, 1::2], logits[1, 8:] = -math.inf, -math.inf
    assert_right(cross_entropy_with_gradient, logits, target)


@pytest.mark.parametrize("wrong", [300, -1, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_seen_and_read_nowhere(wrong: int, reduction: str) -> None:
    whole = torch.full((12, 300), math.nan)  # what is read beyond would be NaN in other rows, too
    whole[4:8] = randn(4, 300)
    target = torch.tensor([5, wrong, 299, -100])
    run = cross_entropy_with_gradient.impls["triton"].fn
    loss, gradient = run(whole[4:8], target, reduction=reduction)
    assert gradient.isnan().all(-1).tolist() == [False, True, False, False]
    assert not gradient[[0, 2, 3]].isnan().any()
    assert loss.isnan().tolist() == ([False, True, False, False] if reduction == "none" else True)


def test_all_rows_ignored() -> None:
    logits, target = randn(4, 300, dtype=BF16), torch.full((4,), 7)
    run = cross_entropy_with_gradient.impls["triton"].fn
    loss, gradient = run(logits, target, ignore_index=7)
    assert loss.isnan()
    assert not gradient.any()
    assert run(logits, target, ignore_index=7, reduction="sum")[0] == 0


def test_an_ignored_row_may_hold_anything() -> None:
    logits, target = randn(4, 300), torch.tensor([1, -100, 2, -100])
    logits[1], logits[3, ::2] = math.nan, math.inf
    loss, gradient = cross_entropy_with_gradient.impls["triton"].fn(logits, target)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[[1, 3]].any()


def test_strided_arguments() -> None:
    logits, target = randn(5, 160)[:, 16:112], targets(10, 96, CPU, 0)[::2]
    grads = randn(1).expand(5)
    assert_right(cross_entropy_with_gradient, logits, target, grads, reduction="none")
    assert_right(cross_entropy_with_gradient, logits, target, randn(10)[::2], reduction="none")
    assert_right(scale_gradient, randn(5, 96), grads)
    assert_right(scale_gradient, randn(5, 96), randn(10)[::2])


def test_the_gradient_may_take_the_logits_place() -> None:
    logits, target, losses = randn(5, 600, dtype=BF16), targets(5, 600, CPU, 0), torch.empty(5)
    expected = cross_entropy_with_gradient.impls["triton"].fn(logits, target, reduction="sum", z_loss=1e-3)[1]
    for padded in (False, True):
        wider = torch.full((5, 704), math.nan, dtype=BF16)
        within = wider[:, :600].copy_(logits)
        kernels.rows(within, target, None, None, losses, within, -100, 0.0, 1e-3, None, padded=padded)
        assert torch.equal(within, expected)
        assert wider[:, 608 if padded else 600 :].isnan().all(), "it wrote past a row's end"


@pytest.mark.parametrize("size", [593, 600, 608])
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_padding_counts_for_nothing(size: int, softcap: float | None) -> None:
    logits, target = randn(5, size, dtype=BF16), targets(5, size, CPU, 0)
    for fill in (math.nan, math.inf, 1e30):
        memory, losses = torch.full((5, 640), fill, dtype=BF16), torch.empty(5)
        within = memory[:, :size].copy_(logits)
        kernels.rows(within, target, None, None, losses, within, -100, 0.1, 1e-3, softcap, padded=True)
        args = cross_entropy_with_gradient.bind(logits, target, None, -100, 0.1, 1e-3, softcap, "none")
        eager = cross_entropy_with_gradient.reference(*args)
        assert_close((losses, within.contiguous()), eager, oracle(cross_entropy_with_gradient.reference, *args))


def test_rows_that_do_not_begin_at_16_bytes() -> None:
    """There threads take neighbours one by one."""
    whole, target = randn(5, 1610, dtype=BF16), targets(5, 1600, CPU, 0)
    launches: list[Launch] = []
    for logits, aligned in ((whole[:, :1600], False), (whole[:, 1:1601].contiguous(), True)):
        with recording(launches.append, H200):
            cross_entropy.impls["triton"].fn(logits, target)
        assert launches[-2].constants["ALIGNED"] == aligned
        assert_right(cross_entropy_with_gradient, logits, target, label_smoothing=0.1)


def test_more_rows_than_one_block_of_sums() -> None:
    rows = 5000
    target = targets(rows, 2, CPU, 0)
    share = kernels.mean_share(target, -100)
    assert_close(share, 1 / (target != -100).sum().float(), 1 / (target != -100).sum().double())
    losses = randn(rows)
    assert_close(kernels.total(losses, share), losses.sum() * share, losses.double().sum() * share.double())


@pytest.mark.parametrize("rows", [128, 300])
def test_chunks_of_a_product(rows: int) -> None:
    x, weight = randn(rows, 16, dtype=BF16), randn(65, 16, dtype=BF16, seed=1) / 4
    args = x, weight, targets(rows, 65, CPU, 0), randn(65, dtype=BF16, seed=2)
    assert_right(linear_cross_entropy_with_gradients, *args, config=Chunks(128), needs_bias=True, z_loss=1e-3)


def test_the_same_bits_each_time() -> None:
    logits, target = randn(5, 3000, dtype=BF16), targets(5, 3000, CPU, 0)
    runs = [cross_entropy_with_gradient.impls["triton"].fn(logits, target, label_smoothing=0.1) for _ in range(2)]
    assert all(map(torch.equal, *runs))


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [torch.tensor(1.0), torch.tensor(0.5), torch.tensor([1.0, -2.0, 0.0])])
def test_scaling_in_place(factor: Tensor) -> None:
    gradient = randn(3, 300, dtype=BF16)
    expected = scale_gradient.reference(gradient, factor)
    in_place = scale_gradient.impls["triton"].in_place
    assert in_place is not None
    assert in_place(gradient, factor) is gradient
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("factor", "stores"), [(1.0, 0), (0.5, 3)])
def test_where_the_factor_is_1_nothing_is_written(factor: float, stores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    store, made = interpreter.InterpreterBuilder.create_masked_store, []

    def counting(*args: Any) -> Any:
        made.append(args)
        return store(*args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counting)
    in_place = scale_gradient.impls["triton"].in_place
    assert in_place is not None
    in_place(randn(3, 50), torch.tensor(factor))
    assert len(made) == stores


# --- how they are launched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 100, 8192])
@pytest.mark.parametrize("size", [1, 33, 1000, 4096, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("backward", [True, False])
def test_configs_are_few_distinct_and_fill_their_threads(
    rows: int, size: int, dtype: torch.dtype, backward: bool
) -> None:
    configs = kernels.cross_entropy_configs(rows, size, dtype, backward, H200)
    assert 1 <= len(configs) <= 8
    assert len({str(config) for config in configs}) == len(configs)
    for config in configs:
        assert config["E"] * dtype.itemsize == 16
        assert config["N"] * config["E"] <= config.num_warps * 32 * 32  # entries that one thread holds
        assert config["PER_SM"] * config.num_warps <= 64


def test_rows_under_way_fit_the_cache() -> None:
    """What the second walk reads again has to lie there still: about half of each row, on average."""
    for config in kernels.cross_entropy_configs(8192, 128256, BF16, True, H200):
        assert config["PER_SM"] * H200.num_sms * 128256 * 2 // 2 < 50 << 20


def test_three_launches_and_no_copies() -> None:
    launches: list[Launch] = []
    logits, target = torch.empty(8192, 1024, dtype=BF16)[:, :1000], torch.zeros(8192, dtype=torch.int64)
    with recording(launches.append, H200):
        cross_entropy_with_gradient.impls["triton"].fn(logits, target)
    assert [launch.kernel.__name__ for launch in launches] == [
        "_share_kernel",
        "_cross_entropy_kernel",
        "_total_kernel",
    ]
    assert launches[1].args[0] is logits
    assert launches[1].grid[0] <= 132 * 64


def test_reasons_against() -> None:
    logits = torch.empty(2, 8, device="meta", dtype=torch.float64)
    reasons = cross_entropy.impls["triton"].why_not(logits, torch.empty(2, device="meta", dtype=torch.int64))
    assert "the inputs are torch.float64; the kernels take float16, bfloat16 and float32" in reasons
