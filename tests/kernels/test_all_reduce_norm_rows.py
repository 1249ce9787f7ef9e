"""The kernel that pushes many rows to other GPUs, in Triton's interpreter, as in `test_all_reduce_norm.py`."""

from __future__ import annotations

from threading import Timer
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.parallel.symmetric import MOST_PUSHED_ROWS, MOST_RANKS, Room

pytest.importorskip("triton")

import triton
import triton.language as tl

from burnish.kernels import all_reduce_norm as few
from burnish.kernels import all_reduce_norm_rows as kernel
from burnish.kernels.launch import Config, Launch, recording
from tests.kernels.test_all_reduce_norm import BF16, FP16, FP32, H200, Ranks, assert_right, numbers, store


@triton.jit
def settle(count):
    pass


@triton.jit
def signal(flags, count, call):
    flag = tl.arange(0, 32)
    tl.store(flags + flag, call, flag < count)


@triton.jit
def acquire(flag):
    return tl.load(flag, volatile=True)


@pytest.fixture(autouse=True)
def no_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows none, and has one thread."""
    for function in (settle, signal, acquire):
        monkeypatch.setattr(kernel, function.__name__, function)
    monkeypatch.setattr(few, "send", store)


class Pushing(Ranks):
    def sum(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return kernel.all_reduce_add_norm_rows(*args, **options)

    def place(self, room: Room, sender: int) -> Tensor:
        return room.pushed[self.call & 1, sender - (sender > room.rank)]

    def deliver(self, room: Room, sender: int, x: Tensor) -> None:
        place = self.place(room, sender)
        place[MOST_PUSHED_ROWS:].view(x.dtype)[: x.numel()] = x.flatten()
        place[: x.numel() // x.shape[-1]] = self.call


def config(rows: int, per_sm: int = 2, pushes: int = 4, num_warps: int = 1) -> Config:
    return Config.of(num_warps=num_warps, ROWS=rows, PER_SM=per_sm, PUSHES=pushes)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize(
    ("ranks", "shape", "dtype", "rows"),
    [
        (2, (1, 1, 128), BF16, 2),
        (2, (19, 34), FP16, 2),  # more rows than programs, and the last of a block is missing
        (3, (2, 5, 23), BF16, 4),
        (4, (3, 33), FP32, 1),
        (5, (9, 8), FP16, 32),
        (MOST_RANKS, (1, 2), BF16, 2),
    ],
    ids=str,
)
def test_the_sum_over_the_ranks_is_added_and_normalized(
    ranks: int, shape: tuple[int, ...], dtype: torch.dtype, rows: int, rms: bool
) -> None:
    xs = [numbers(*shape, dtype=dtype, seed=seed) for seed in range(ranks)]
    residual, bias = numbers(*shape, dtype=dtype, seed=20), numbers(shape[-1], dtype=dtype, seed=21)
    weight, shift = randn(shape[-1], seed=22), None if rms else randn(shape[-1], dtype=dtype, seed=23)
    results = Pushing(ranks).run(xs, bias, residual, weight, shift, 1e-5, rms, True, config=config(rows))
    assert_right(results, xs, bias, residual, (weight, shift), rms)
    plain = Pushing(ranks).run(xs, None, residual, None, None, 1e-5, rms, False, config=config(rows))
    assert_right(plain, xs, None, residual, (None, None), rms)
    assert all(total.shape == (0,) for _, total in plain)


def test_the_bits_are_those_of_the_parts_and_of_the_kernel_for_few_rows() -> None:
    for dtype, ranks in ((FP16, 2), (FP32, 2), (FP16, 3)):
        xs = [randn(4, 64, dtype=dtype, seed=seed) for seed in range(ranks)]
        residual, bias = randn(4, 64, dtype=dtype, seed=7), randn(64, dtype=dtype, seed=8)
        args = xs, bias, residual, bias, None, 1e-5, True, True
        found, others = Pushing(ranks).run(*args), Ranks(ranks).run(*args)
        for mine, other in zip(found, others, strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
            assert ranks > 2 or torch.equal(mine[1], ((xs[0] + xs[1]) + bias) + residual)


@pytest.mark.parametrize("first", [1, 2**31 - 3, -2], ids=["", "where the sign changes", "at the end"])
def test_calls_take_turns_with_those_of_the_kernel_for_few_rows(first: int) -> None:
    """Of other sizes each time: what was there before is of an earlier call."""
    ranks, residual = Pushing(2, call=first), numbers(6, 48, dtype=BF16, seed=30)
    for i, (rows, are_few) in enumerate(((6, False), (2, True), (3, False), (5, False), (1, True), (6, False))):
        xs = [numbers(rows, 48, dtype=BF16, seed=2 * i + r) for r in (0, 1)]
        ranks.__class__ = Ranks if are_few else Pushing
        results = ranks.run(xs, None, residual[:rows], None, None, 1e-5, True, True)
        assert_right(results, xs, None, residual[:rows], (None, None), True)


def test_rows_whose_flags_are_of_an_earlier_call_are_waited_for() -> None:
    ranks, residual = Pushing(2, call=3), numbers(2, 8, dtype=FP16, seed=30)
    mine, stale, theirs = (numbers(2, 8, dtype=FP16, seed=seed) for seed in (31, 32, 33))
    room = ranks.rooms[0]
    ranks.deliver(room, 1, stale)
    ranks.call = 5
    room.state[0] = 5
    late = Timer(0.3, ranks.deliver, (room, 1, theirs))
    late.start()
    _, total = kernel.all_reduce_add_norm_rows(mine, None, residual, None, None, 1e-5, True, True, room)
    late.join()
    assert torch.equal(total, (mine + theirs) + residual)


def test_any_strides_and_odd_beginnings() -> None:
    xs = [randn(4, 3, 16, dtype=FP16, seed=seed).transpose(0, 1) for seed in (0, 1)]
    residual = randn(3, 16, 4, dtype=FP16, seed=2).transpose(1, 2)
    bias, weight, shift = (randn(16, 3, dtype=FP16, seed=seed)[:, 1] for seed in (3, 4, 5))
    results = Pushing(2).run(xs, bias, residual, weight, shift, 1e-5, False, True)
    assert_right(results, xs, bias, residual, (weight, shift), False)
    xs = [randn(2 * 16 + 1, dtype=FP16, seed=seed)[1:].view(2, 16) for seed in (0, 1)]
    results = Pushing(2).run(xs, None, residual[0, :2], weight, None, 1e-5, True, True)
    assert_right(results, xs, None, residual[0, :2], (weight, None), True)


@pytest.mark.parametrize("given", kernel.all_reduce_norm_rows_configs(2048, 4096, 2), ids=str)
def test_every_config(given: Config) -> None:
    xs = [randn(9, 16, dtype=FP16, seed=seed) for seed in (0, 1)]
    residual = randn(9, 16, dtype=FP16, seed=2)
    results = Pushing(2).run(xs, None, residual, None, None, 1e-5, True, True, config=given)
    assert_right(results, xs, None, residual, (None, None), True)


def test_blocks_of_several_tiles() -> None:
    """A warp's 32 threads push 64 bytes each at a time: 1024 numbers, of the 2400 of a block."""
    xs = [randn(5, 800, dtype=FP16, seed=seed) for seed in (0, 1)]
    residual = randn(5, 800, dtype=FP16, seed=2)
    results = Pushing(2, capacity=2048).run(
        xs, None, residual, None, None, 1e-5, True, True, config=config(3, num_warps=1)
    )
    assert_right(results, xs, None, residual, (None, None), True)


def test_a_multiprocessor_holds_its_share_of_the_programs() -> None:
    """They wait for other GPUs at the same time; whoever pushes is among the first, and waits for nobody."""
    room, other = Pushing(2).rooms
    launches: list[Launch] = []
    with recording(launches.append, H200):
        for rows, mine in ((2048, room), (3, room), (2047, other)):
            for N, dtype in ((4096, BF16), (4096, FP32), (8192, BF16), (768, FP16), (64, BF16)):
                x = torch.empty(rows, N, dtype=dtype)
                for given in kernel.all_reduce_norm_rows_configs(rows, N, x.element_size()):
                    kernel.all_reduce_add_norm_rows(x, None, x, None, None, 1e-5, True, True, mine, given)
    for launch in launches:
        (programs,), (rows, senders) = launch.grid, launch.args[11:13]
        per_sm, warps = launch.constants["PER_SM"], launch.options["num_warps"]
        assert senders >= 1
        assert programs - senders >= 1
        assert programs <= per_sm * H200.num_sms
        assert programs <= 2 * rows
        assert launch.options["maxnreg"] * per_sm * warps * 32 <= 1 << 16
        assert launch.constants["ROWS"] <= 32, "one warp writes the flags"
        assert launch.options["launch_pdl"]


def test_one_kernel_for_any_number_of_rows_and_either_rank() -> None:
    launches: list[Launch] = []
    with recording(launches.append, H200):
        for rows, mine in ((1000, 0), (2048, 0), (2047, 1)):
            x = torch.empty(rows, 4096, dtype=BF16)
            kernel.all_reduce_add_norm_rows(x, None, x, None, None, 1e-5, True, True, Pushing(2).rooms[mine])
    assert all(launch.constants == launches[0].constants for launch in launches)


def test_few_rows_have_one_config() -> None:
    """To compile several for each step of decoding is not worth it."""
    assert len(kernel.all_reduce_norm_rows_configs(64, 4096, 2)) == 1
    configs = kernel.all_reduce_norm_rows_configs(2048, 4096, 2)
    assert len(configs) > 2
    assert len(set(configs)) == len(configs)
    assert kernel.all_reduce_norm_rows_configs(64, 4096, 2)[0] == configs[0]
