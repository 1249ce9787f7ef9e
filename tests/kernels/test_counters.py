"""Which kernels count with the same numbers, decided without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import counters as module
from burnish.kernels.counters import counters, new_counters, own_counters

CPU = torch.device("cpu")
LIKE: Any = SimpleNamespace(is_cuda=True, device=CPU)  # a tensor of a GPU whose memory is the CPU's


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream, and whether it is being captured."""
    now = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(module, "_buffers", {})
    monkeypatch.setattr(module, "_captured", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    return now


def place(numbers: Tensor) -> int:
    assert not numbers.any()
    return numbers.data_ptr()


def test_launches_of_one_stream_share_and_those_of_two_do_not(stream: SimpleNamespace) -> None:
    first = place(counters(LIKE, 7))
    assert place(counters(LIKE, 100_000)) == first
    stream.cuda_stream = 2
    assert place(counters(LIKE, 7)) != first


def test_graphs_of_one_memory_share_and_those_of_two_do_not(stream: SimpleNamespace) -> None:
    stream.capturing = True
    one, other = new_counters(CPU), new_counters(CPU)
    with own_counters(one):
        assert place(counters(LIKE, 7)) == place(counters(LIKE, 100_000)) == one.data_ptr()
        with own_counters(other):
            assert place(counters(LIKE, 7)) == other.data_ptr()
        assert place(counters(LIKE, 7)) == one.data_ptr()


def test_captured_by_somebody_else_each_launch_has_its_own(stream: SimpleNamespace) -> None:
    counters(LIKE, 1)  # before a capture, whose memory would be set to zero by each replay
    stream.capturing = True
    places = [place(counters(LIKE, count)) for count in (7, 33, 1, 4096)]
    assert [at - places[0] for at in places] == [0, 128, 384, 512]  # so that words of 64 bits can be kept there
    assert place(counters(LIKE, 100_000)) not in places


def test_more_than_there_is_room_for_are_fresh(stream: SimpleNamespace) -> None:
    numbers = counters(LIKE, (1 << 18) + 1)
    assert numbers.shape == ((1 << 18) + 1,)
    assert numbers.data_ptr() != place(counters(LIKE, 1))
