"""A model, a clock that only steps move, and a search with them: nothing waits, and every number is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from burnish.scheduling.search import SearchResult, search_schedules
from burnish.scheduling.search.space import Choice

MIB = 2**20


class Clock:
    """Stands for the module `time` where calls are timed."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@dataclass
class Fake:
    """A task whose steps take `seconds(choice)` and hold `mib(choice)` MiB; `built` lists the choices in order."""

    clock: Clock
    seconds: Any = lambda choice: 0.1
    mib: Any = lambda choice: 1
    built: list[Choice] = field(default_factory=list)

    def apply(self, sch: Any, choice: Choice) -> None:
        self.built.append(choice)
        if choice.get("match") == "nothing":
            sch.fuse("no such module")

    def step(self, module: nn.Module, choice: Choice) -> None:
        self.clock.now += self.seconds(choice)
        torch.empty(int(self.mib(choice) * MIB), dtype=torch.uint8)

    def search(self, space: Any, **options: Any) -> SearchResult:
        return search_schedules(Tiny, space, self.apply, self.step, seconds=0.01, **options)
