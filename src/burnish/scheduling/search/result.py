"""`SearchResult`: the trials of a search, the best, a table and a plot of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from burnish._text import human_bytes, human_us, plain
from burnish.scheduling.schedule import Schedule
from burnish.scheduling.search.task import Task
from burnish.scheduling.search.trial import Trial, rate

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class SearchResult:
    """What a search has tried. Prints as a table, the best first.

    Attributes:
        trials: in the order in which they were tried.
        choices: how many there are to choose from.
        memory_limit: in bytes.
        baseline: the trial that the others were measured beside; None where none worked.
    """

    trials: list[Trial]
    choices: int
    memory_limit: float | None
    baseline: Trial | None
    task: Task = field(repr=False)

    @property
    def ranked(self) -> list[Trial]:
        """What works within the limit, the best first; then what works beyond it; then the rest."""
        return sorted(self.trials, key=lambda trial: (self._class(trial), -trial.throughput))

    @property
    def best(self) -> Trial:
        """The trial with the highest throughput whose memory is within the limit. ValueError where there is none."""
        if not self._has_best():
            reasons = dict.fromkeys(self._note(trial) for trial in self.trials)
            raise ValueError(f"no trial works within the limit: {'; '.join(reasons) or 'none was run'}")
        return self.ranked[0]

    @property
    def front(self) -> list[Trial]:
        """The Pareto front, from the least memory: trials of which no other has more throughput with as little."""
        found: list[Trial] = []
        measured = [trial for trial in self.trials if trial.worked]
        for trial in sorted(measured, key=lambda trial: (trial.memory or 0, -trial.throughput)):
            if not found or trial.throughput > found[-1].throughput:
                found.append(trial)
        return found

    def speedup(self, trial: Trial) -> float:
        """How many times the baseline's throughput it has; 0 where it did not work."""
        return 0.0 if self.baseline is None else trial.throughput / self.baseline.throughput

    def schedule(self, model: nn.Module) -> Schedule:
        """A Schedule of `model` with the best choice applied. ValueError where no trial works within the limit."""
        return self.task.schedule(model, self.best.choice)

    def plot(self, path: str | Path) -> Path:
        """Draws throughput against peak memory, and returns the path: .svg, .png or .pdf.

        Raises ValueError where matplotlib is missing, for another suffix, and where no trial worked.
        """
        from burnish.scheduling.search.plot import plot_search

        return plot_search(self, Path(path))

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.trials[0].choice if self.trials else ():
            table.add_column(name)
        for heading in ("a call", "per second", "x baseline", "memory"):
            table.add_column(heading, justify="right")
        table.add_column("", overflow="fold")
        for trial in self.ranked:
            best = self._has_best() and trial is self.best
            cells = [*map(str, trial.choice.values()), *self._numbers(trial), self._note(trial)]
            table.add_row(*map(Text, cells), style="bold green" if best else "" if trial.worked else "dim")
        return Group(Text(self._title(), style="italic"), table)

    def __str__(self) -> str:
        return plain(self)

    def _class(self, trial: Trial) -> int:
        if trial.worked:
            return 0 if trial.fits(self.memory_limit) else 1
        return 3 if trial.skipped else 2

    def _has_best(self) -> bool:
        return any(self._class(trial) == 0 for trial in self.trials)

    def _title(self) -> str:
        run = sum(not trial.skipped for trial in self.trials)
        limit = "" if self.memory_limit is None else f"; at most {human_bytes(self.memory_limit)}"
        where = "" if self.baseline is None else f"; {self.baseline.device}"
        return f"{run} of {self.choices} choices tried{limit}{where}"

    def _numbers(self, trial: Trial) -> list[str]:
        if trial.seconds is None or trial.memory is None:
            return [""] * 4
        times = f"{self.speedup(trial):.2f}x"
        return [human_us(trial.seconds * 1e6), rate(trial.throughput), times, human_bytes(trial.memory)]

    def _note(self, trial: Trial) -> str:
        notes = [
            "best" if self._has_best() and trial is self.best else "",
            "baseline" if trial.is_baseline else "",
            "over the limit" if trial.worked and not trial.fits(self.memory_limit) else "",
            "" if trial.in_turn else "measured alone",
            trial.failure,
        ]
        return ", ".join(filter(None, notes))
