"""Measuring in captured graphs, on a device that the test plays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish import measure
from burnish.measure import measure_captured


class Device:
    """A clock, and graphs that take so many milliseconds: `early` for their first replays, `late` from then on."""

    FIRST = 7

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.captured = 0.0, (0.0, 0.0)
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class Graph:
            def __init__(self) -> None:
                self.replays, (self.early, self.late) = 0, device.captured

            def replay(self) -> None:
                device.now += self.early if self.replays < device.FIRST else self.late
                self.replays += 1

        class Memory:
            def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
                run()
                return Graph(), None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(measure, "GraphMemory", Memory)

    def function(self, early: float, late: float) -> Callable[[torch.Tensor], None]:
        def run(x: torch.Tensor) -> None:
            self.captured = early, late

        return run


def test_the_fastest_are_measured_again_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    functions = {
        "cool": device.function(0.9, 1.2),  # measured while the device was cool
        "steady": device.function(0.95, 0.95),
        "slow": device.function(3.0, 1.0),
    }
    times = measure_captured(functions, [(torch.zeros(2),)], ())
    calls = measure._CHAIN[0]
    assert times == {"cool": pytest.approx(1200 / calls), "steady": pytest.approx(950 / calls), "slow": 3000 / calls}


def test_what_cannot_be_captured_takes_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def fails(x: torch.Tensor) -> None:
        raise RuntimeError("no graph can hold this")

    times = measure_captured({"fails": fails, "works": device.function(1.0, 1.0)}, [(torch.zeros(2),)], ())
    assert times["fails"] == math.inf
    assert times["works"] < math.inf
