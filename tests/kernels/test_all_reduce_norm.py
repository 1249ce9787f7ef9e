"""The kernel that sums rows over GPUs by memory that they share, in Triton's interpreter: the GPUs are tensors of one
process, and what the others send is there before a rank's turn comes."""

from __future__ import annotations

from dataclasses import replace
from threading import Timer
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm
from burnish.parallel.symmetric import MOST_BYTES, MOST_PUSHED_ROWS, MOST_RANKS, Room, capacity_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from burnish.kernels import all_reduce_norm as kernel
from burnish.kernels.launch import Launch, Target, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)


@triton.jit
def store(pointers, words, mask):
    tl.store(pointers, words, mask)


@pytest.fixture(autouse=True)
def no_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows none."""
    monkeypatch.setattr(kernel, "send", store)


def following(call: int) -> int:
    """An int32's next number; fresh words say that they are of call 0, so that one is left out, and its turn kept."""
    return {-1: 2, 2**31 - 1: -(2**31)}.get(call, call + 1)


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """In bfloat16 whole ones, whose sums are exact: the interpreter cuts bfloat16 off where GPUs round it."""
    values = randn(*shape, dtype=dtype, seed=seed)
    return (4 * values).round().clamp(-60, 60) if dtype == BF16 else values


class Ranks:
    """The rooms of some ranks, and what each has to sum."""

    def __init__(self, ranks: int, capacity: int = 512, call: int = 1) -> None:
        words = [torch.zeros(2, ranks, capacity, dtype=torch.int64) for _ in range(ranks)]
        pushed = [torch.zeros(2, ranks - 1, MOST_PUSHED_ROWS + capacity, dtype=torch.int32) for _ in range(ranks)]
        addresses, pushed_addresses = (torch.tensor([each.data_ptr() for each in of]) for of in (words, pushed))
        states = [torch.tensor([call, 0], dtype=torch.int32) for _ in range(ranks)]
        self.rooms = [Room(words[r], addresses, states[r], r, pushed[r], pushed_addresses) for r in range(ranks)]
        self.call = call

    def run(self, xs: list[Tensor], *args: Any, **options: Any) -> list[tuple[Tensor, Tensor]]:
        """What each rank has after one call. What the kernels send has to be what the others were given."""
        for room in self.rooms:
            for r in range(len(xs)):
                if r != room.rank:
                    self.place(room, r).fill_(-1)  # nothing is read there but what arrives now
                    self.deliver(room, r, xs[r])
        given = [(room.words.clone(), room.pushed.clone()) for room in self.rooms]
        results = []
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
        try:
            for room, x in zip(self.rooms, xs, strict=True):
                for other in self.rooms:  # taken away, so that the kernel has to put it there
                    if other is not room:
                        self.place(other, room.rank).fill_(-1)
                results.append(self.sum(x, *args, room=room, **options))
        finally:
            torch.use_deterministic_algorithms(False)
        for room, (words, pushed) in zip(self.rooms, given, strict=True):
            assert torch.equal(room.words, words)
            assert torch.equal(room.pushed, pushed)
        self.call = following(self.call)
        assert [room.state.tolist() for room in self.rooms] == [[self.call, 0]] * len(xs)
        return results

    def sum(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return kernel.all_reduce_add_norm(*args, **options)

    def place(self, room: Room, sender: int) -> Tensor:
        """Where the sender's rows arrive in this call."""
        return room.words[self.call & 1, sender]

    def deliver(self, room: Room, sender: int, x: Tensor) -> None:
        data = x.contiguous().clone().view(torch.int32).flatten().long() & 0xFFFFFFFF
        self.place(room, sender)[: data.numel()] = data | (self.call << 32)


def assert_right(
    results: list[tuple[Tensor, Tensor]],
    xs: list[Tensor],
    bias: Tensor | None,
    residual: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    rms: bool,
) -> None:
    """By the rule, against the sum as torch adds it up; the same bits on all ranks."""

    def reference(residual: Tensor, bias: Any, weight: Any, shift: Any, *xs: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.stack(xs).to(torch.promote_types(xs[0].dtype, FP32)).sum(dim=0).to(xs[0].dtype)
        if rms:
            return all_reduce_add_rms_norm.reference(total, bias, residual, weight, 1e-5)
        return all_reduce_add_layer_norm.reference(total, bias, residual, weight, shift, 1e-5)

    args = residual, bias, *norm, *xs
    eager, truth = reference(*args), oracle(reference, *args)
    for normed, total in results:
        assert normed.is_contiguous()
        assert torch.equal(normed, results[0][0])
        assert torch.equal(total, results[0][1])
        assert_close(normed, eager[0], truth[0])
        if total.numel():
            assert_close(total, eager[1], truth[1])


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize(
    ("ranks", "shape", "dtype"),
    [
        (2, (1, 1, 128), BF16),
        (2, (3, 34), FP16),
        (3, (2, 5, 24), BF16),
        (4, (2, 33), FP32),
        (MOST_RANKS, (1, 2), BF16),
    ],
    ids=str,
)
def test_the_sum_over_the_ranks_is_added_and_normalized(
    ranks: int, shape: tuple[int, ...], dtype: torch.dtype, rms: bool
) -> None:
    xs = [numbers(*shape, dtype=dtype, seed=seed) for seed in range(ranks)]
    residual, bias = numbers(*shape, dtype=dtype, seed=20), numbers(shape[-1], dtype=dtype, seed=21)
    weight, shift = randn(shape[-1], seed=22), None if rms else randn(shape[-1], dtype=dtype, seed=23)
    results = Ranks(ranks).run(xs, bias, residual, weight, shift, 1e-5, rms, True)
    assert_right(results, xs, bias, residual, (weight, shift), rms)
    plain = Ranks(ranks).run(xs, None, residual, None, None, 1e-5, rms, False)
    assert_right(plain, xs, None, residual, (None, None), rms)
    assert all(total.shape == (0,) for _, total in plain)


def test_the_bits_of_two_ranks_are_those_of_the_parts() -> None:
    """Each sum is rounded where NCCL and torch round it."""
    for dtype in (FP16, FP32):
        xs = [randn(4, 64, dtype=dtype, seed=seed) for seed in (0, 1)]
        residual, bias = randn(4, 64, dtype=dtype, seed=2), randn(64, dtype=dtype, seed=3)
        for _, total in Ranks(2).run(xs, bias, residual, None, None, 1e-5, True, True):
            assert torch.equal(total, ((xs[0] + xs[1]) + bias) + residual)


@pytest.mark.parametrize("first", [1, 2**31 - 3, -2], ids=["", "where the sign changes", "at the end"])
def test_calls_take_turns(first: int) -> None:
    """Of other sizes each time: what was there before is of an earlier call."""
    ranks, residual = Ranks(2, call=first), numbers(3, 48, dtype=BF16, seed=30)
    for i, rows in enumerate((3, 1, 2, 3)):
        xs = [numbers(rows, 48, dtype=BF16, seed=2 * i + r) for r in (0, 1)]
        results = ranks.run(xs, None, residual[:rows], None, None, 1e-5, True, True)
        assert_right(results, xs, None, residual[:rows], (None, None), True)


def test_words_of_an_earlier_call_are_waited_out() -> None:
    ranks, residual = Ranks(2, call=5), numbers(1, 8, dtype=FP16, seed=30)
    mine, stale, theirs = (numbers(1, 8, dtype=FP16, seed=seed) for seed in (31, 32, 33))
    room = ranks.rooms[0]
    ranks.call = 3
    ranks.deliver(room, 1, stale)
    ranks.call = 5
    late = Timer(0.3, ranks.deliver, (room, 1, theirs))
    late.start()
    _, total = kernel.all_reduce_add_norm(mine, None, residual, None, None, 1e-5, True, True, room)
    late.join()
    assert torch.equal(total, (mine + theirs) + residual)


def test_any_strides() -> None:
    xs = [randn(4, 3, 16, dtype=FP16, seed=seed).transpose(0, 1) for seed in (0, 1)]
    residual = randn(3, 16, 4, dtype=FP16, seed=2).transpose(1, 2)
    bias, weight, shift = (randn(16, 3, dtype=FP16, seed=seed)[:, 1] for seed in (3, 4, 5))
    results = Ranks(2).run(xs, bias, residual, weight, shift, 1e-5, False, True)
    assert_right(results, xs, bias, residual, (weight, shift), False)


def test_rows_that_begin_between_two_words() -> None:
    xs = [randn(2 * 16 + 1, dtype=FP16, seed=seed)[1:].view(2, 16) for seed in (0, 1)]
    residual = randn(2, 16, dtype=FP16, seed=2)
    results = Ranks(2).run(xs, None, residual, None, None, 1e-5, True, True)
    assert_right(results, xs, None, residual, (None, None), True)


@pytest.mark.parametrize("config", kernel.all_reduce_norm_configs(4096, 2), ids=str)
def test_every_config(config: Any) -> None:
    xs = [randn(1, 64, dtype=FP16, seed=seed) for seed in (0, 1)]
    residual = randn(1, 64, dtype=FP16, seed=2)
    results = Ranks(2).run(xs, None, residual, None, None, 1e-5, True, True, config=config)
    assert_right(results, xs, None, residual, (None, None), True)


def test_one_launch_and_one_kernel_for_any_number_of_rows_and_either_rank() -> None:
    launches: list[Launch] = []
    (room, other) = Ranks(2).rooms
    with recording(launches.append, H200):
        for rows, mine in ((1, room), (5, room), (5, other)):
            x = randn(rows, 64, dtype=BF16)
            kernel.all_reduce_add_norm(x, None, x, None, None, 1e-5, True, True, mine)
    assert [launch.grid for launch in launches] == [(1,), (5,), (5,)]
    assert all(launch.constants == launches[0].constants for launch in launches)
    assert all(launch.options["launch_pdl"] for launch in launches)


def test_what_a_rank_sends_fits_for_every_number_of_ranks() -> None:
    assert capacity_of(2) * 4 == MOST_BYTES
    for ranks in range(2, MOST_RANKS + 1):
        assert capacity_of(ranks) % 16 == 0
        assert capacity_of(ranks) * 4 * (ranks - 1) <= MOST_BYTES
    room = Ranks(3, capacity=32).rooms[1]
    assert (room.ranks, room.capacity) == (3, 32)
    assert replace(room, rank=2).rank == 2
