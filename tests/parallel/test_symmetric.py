"""When GPUs can exchange rows by memory that they share, and what is said where they cannot."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from burnish.parallel import set_up_symmetric_memory, symmetric
from burnish.parallel.group import named

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WORLD = "0"


def start() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture
def alone() -> Iterator[None]:
    start()
    yield
    dist.destroy_process_group()


def put(device: torch.device, ranks: int = 2, rank: int = 0) -> symmetric.Room:
    """A room of the group of all processes, as if it had been set up."""
    capacity = symmetric.capacity_of(ranks)
    words = torch.empty(2, ranks, capacity, dtype=torch.int64, device="meta")
    pushed = torch.empty(symmetric.pushed_shape(ranks), dtype=torch.int32, device="meta")
    room = symmetric.Room(words, torch.zeros(ranks), torch.zeros(2), rank, pushed, torch.zeros(ranks))
    symmetric._rooms[WORLD, device] = weakref.ref(named(WORLD)), room
    return room


def test_nothing_is_set_up_by_asking(alone: None) -> None:
    assert symmetric.find(WORLD, GPU) is None
    (reason,) = symmetric.why_not(WORLD, GPU, 1, 8192)
    assert "no symmetric memory is set up for the group" in reason
    assert symmetric.why_not("", GPU, 1, 8192) == ["this process is alone: there is nothing to exchange"]


def test_where_it_cannot_be_it_is_said_and_remembered(alone: None) -> None:
    reason = "symmetric memory is for CUDA devices, not for cpu"
    assert set_up_symmetric_memory() == reason
    assert symmetric.why_not(WORLD, CPU, 1, 8192) == [reason]
    assert symmetric.set_up(WORLD, GPU) == "the group's backend is gloo, not nccl: its processes may share a GPU"
    assert symmetric.find(WORLD, GPU) is None


def test_what_does_not_fit(alone: None) -> None:
    room = put(GPU)
    assert symmetric.find(WORLD, GPU) is room
    assert symmetric.set_up(WORLD, GPU) is None
    assert symmetric.why_not(WORLD, GPU, 64, 8192) == []
    assert symmetric.why_not(WORLD, GPU, 65, 8192) == [
        "532480 bytes are more than the 524288 up to which each rank sends all that it has to each of 1"
    ]
    assert symmetric.why_not(WORLD, GPU, 129, 66) == [
        "there are 129 rows; up to 128 programs wait for each other at the same time",
        "rows of 66 bytes are no multiple of 4",
    ]
    assert symmetric.why_not(WORLD, GPU, 8, 8192) == []
    (reason,) = symmetric.why_not(WORLD, GPU, 1, 65536)
    assert reason == "rows of 65536 bytes do not fit a program's registers; 16384 do"
    put(GPU, ranks=8)
    (reason,) = symmetric.why_not(WORLD, GPU, 10, 8192)
    assert "81920 bytes are more than the 74880 up to which" in reason


def test_many_rows_that_do_not_fit(alone: None) -> None:
    assert symmetric.why_not_pushed("", GPU, 1, 8192) == ["this process is alone: there is nothing to exchange"]
    (reason,) = symmetric.why_not_pushed(WORLD, GPU, 1, 8192)
    assert "no symmetric memory is set up for the group" in reason
    put(GPU)
    assert symmetric.why_not_pushed(WORLD, GPU, 1, 66) == []
    assert symmetric.why_not_pushed(WORLD, GPU, 4096, 8192) == []
    assert symmetric.why_not_pushed(WORLD, GPU, 4097, 8192) == [
        "33562624 bytes are more than the 33554432 up to which each rank sends all that it has to each of 1"
    ]
    assert symmetric.why_not_pushed(WORLD, GPU, 32769, 66) == ["there are 32769 rows; 32768 have flags"]
    (reason,) = symmetric.why_not_pushed(WORLD, GPU, 1, 32768)
    assert reason == "rows of 32768 bytes do not fit a program's registers; 16384 do"
    put(GPU, ranks=8)
    assert symmetric.why_not_pushed(WORLD, GPU, 512, 8192) == []
    (reason,) = symmetric.why_not_pushed(WORLD, GPU, 1024, 8192)
    assert reason.endswith("more than the 4793472 up to which each rank sends all that it has to each of 7")


def test_memory_is_the_same_for_any_number_of_ranks() -> None:
    for ranks in range(2, symmetric.MOST_RANKS + 1):
        halves, others, share = symmetric.pushed_shape(ranks)
        assert (halves, others) == (2, ranks - 1)
        assert others * (share - symmetric.MOST_PUSHED_ROWS) * 4 <= symmetric.MOST_PUSHED_BYTES
        assert share % 16 == 0, "16 bytes at a time, wherever a rank's share begins"


def test_nobody_waits_for_one_without_memory(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them hear of it before any goes to where it would wait for the others."""
    asked: list[bool] = []

    def all_ranks(ok: bool, group: object) -> bool:
        asked.append(ok)
        return ok and len(asked) < 4  # the fourth time another one has none

    def allocate(group: object, device: torch.device) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("no memory is left\nat all")

    def rendezvous(*args: object) -> symmetric.Room:
        raise AssertionError("not all have memory")

    monkeypatch.setattr(symmetric, "_why_not_here", lambda group, device: None)
    for name, step in (("_all", all_ranks), ("_allocate", allocate), ("_rendezvous", rendezvous)):
        monkeypatch.setattr(symmetric, name, step)
    assert symmetric._set_up(named(WORLD), CPU) == "torch could not set symmetric memory up: no memory is left"
    monkeypatch.setattr(symmetric, "_allocate", lambda group, device: [])
    assert symmetric._set_up(named(WORLD), CPU) == "another rank of the group got no symmetric memory"
    assert asked == [True, False, True, True]


def test_it_goes_with_the_group(alone: None) -> None:
    put(GPU)
    dist.destroy_process_group()
    assert symmetric.find(WORLD, GPU) is None
    start()
    put(GPU)
    dist.destroy_process_group()
    start()
    assert symmetric.find(WORLD, GPU) is None, "another group has the name now"


def test_without_processes_to_share_with() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized"):
        set_up_symmetric_memory()


def test_multicast_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv(symmetric._NO_MULTICAST, raising=False)
        else:
            monkeypatch.setenv(symmetric._NO_MULTICAST, before)
        with symmetric._without_multicast():
            assert os.environ[symmetric._NO_MULTICAST] == "1"
        assert os.environ.get(symmetric._NO_MULTICAST) == before
