"""`plot_search`: throughput against peak memory, a point for each trial. Draws with matplotlib, the extra `plot`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish._text import human_bytes
from burnish.plot import DOTS, FIRST, INK, OTHERS, OUR_COLOUR, QUIET, check_plot, style_axes
from burnish.scheduling.search.space import key_of
from burnish.scheduling.search.trial import Trial, rate

if TYPE_CHECKING:
    from burnish.scheduling.search.result import SearchResult

_INCHES = (7.6, 4.8)
_PLACE = (0.085, 0.165, 0.88, 0.655)  # of the figure: left, bottom, width, height
_WITHIN, _BASELINE, _BEYOND = OTHERS[0], FIRST, QUIET
# Where a label may stand beside its point: by how many dots to the right and up, and how it is aligned there.
# Above it and to the right below the front's line is not in the way.
_BESIDE = (
    *((0, 7, "center", "bottom"), (-6, 5, "right", "bottom"), (6, -5, "left", "top"), (-8, 0, "right", "center")),
    *((8, 0, "left", "center"), (0, -7, "center", "top")),
)


def plot_search(result: SearchResult, path: Path) -> Path:
    """Draws the trials that worked, the Pareto front as a line, and the limit; returns the path.

    Raises ValueError where matplotlib is missing, for another suffix than .svg, .png or .pdf, and where none worked.
    """
    check_plot(path)
    shown = [trial for trial in result.ranked if trial.worked]
    if not shown:
        raise ValueError("no trial worked: there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=_INCHES)
    FigureCanvasAgg(figure)  # measures texts
    _Plot(result, shown, figure.add_axes(_PLACE)).draw()
    figure.text(0.015, 0.015, _source(result), ha="left", va="bottom", fontsize=7, color=QUIET, linespacing=1.4)
    figure.savefig(path, dpi=DOTS, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return path


@dataclass
class _Plot:
    """Attributes:
    shown: the trials that worked, the best first.
    axes: of matplotlib. Memory is drawn in the unit that `_unit` gives.
    """

    result: SearchResult
    shown: Sequence[Trial]
    axes: Any

    def draw(self) -> None:
        front = self.result.front
        steps = [self._place(trial) for trial in front]
        self.axes.plot(*zip(*steps, strict=True), color=QUIET, linewidth=1, drawstyle="steps-post", alpha=0.6, zorder=1)
        for trial in self.shown:
            colour, fits = self._colour(trial), trial.fits(self.result.memory_limit)
            size, fill = (64 if self._is_best(trial) else 30), (colour if fits else "white")
            self.axes.scatter(*self._place(trial), s=size, color=fill, edgecolors=colour, linewidths=1.3, zorder=3)
        self._style()
        self._draw_limit()
        on_front = {key_of(trial.choice) for trial in front}
        first = sorted(self.shown, key=lambda trial: (not self._is_best(trial), key_of(trial.choice) not in on_front))
        self._label([trial for trial in first if self._varied])

    def _style(self) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = self.axes
        sizes = [self._place(trial)[0] for trial in self.shown]
        if self.result.memory_limit is not None:
            sizes.append(self.result.memory_limit / self._unit[0])
        room = 0.12 * (max(sizes) - min(sizes)) or 0.12 * max(sizes) or 1.0
        axes.set_xlim(max(0.0, min(sizes) - room), max(sizes) + 1.5 * room)
        axes.set_ylim(0, 1.15 * max(self._place(trial)[1] for trial in self.shown))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value) if value > 0 else "0"))
        style_axes(axes)
        axes.set_xlabel(f"peak memory, {self._unit[1]}", color=QUIET, fontsize=9.5)
        above = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0, 1.13, "Schedules: throughput and memory", fontsize=13, fontweight="bold", color=INK, **above)
        told = f"; each point is a choice of {' / '.join(self._varied)}" if self._varied else ""
        axes.text(0, 1.055, f"per second{told}", fontsize=9, color=QUIET, **above)

    def _draw_limit(self) -> None:
        if self.result.memory_limit is None:
            return
        limit = self.result.memory_limit / self._unit[0]
        self.axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        text = f"limit {human_bytes(self.result.memory_limit)}"
        place = {"xytext": (4, -2), "textcoords": "offset points", "va": "top"}
        self.axes.annotate(text, (limit, 1), xycoords=("data", "axes fraction"), fontsize=8.5, color=INK, **place)

    def _label(self, trials: Sequence[Trial]) -> None:
        """The choice beside each point, where there is room: those come first that matter most."""
        from matplotlib.transforms import Bbox

        renderer = self.axes.figure.canvas.get_renderer()
        points = [self.axes.transData.transform(self._place(trial)) for trial in self.shown]
        taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in points]
        taken += [text.get_window_extent(renderer) for text in self.axes.texts]
        ends = [self.axes.transData.transform(end) for line in self.axes.lines[:1] for end in line.get_path().vertices]
        taken += [Bbox([start, end]) for start, end in itertools.pairwise(ends)]
        for trial in trials:
            for right, up, across, along in _BESIDE:
                text = self.axes.annotate(
                    " / ".join(str(trial.choice[name]) for name in self._varied),
                    self._place(trial),
                    xytext=(right, up),
                    textcoords="offset points",
                    ha=across,
                    va=along,
                    fontsize=9 if self._is_best(trial) else 8,
                    fontweight="bold" if self._is_best(trial) else "normal",
                    color=self._colour(trial),
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
                    zorder=2,
                )
                box = text.get_window_extent(renderer)
                if box.x0 >= self.axes.bbox.x0 and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                text.remove()

    def _place(self, trial: Trial) -> tuple[float, float]:
        return (trial.memory or 0) / self._unit[0], trial.throughput

    def _is_best(self, trial: Trial) -> bool:
        return trial is self.shown[0] and trial.fits(self.result.memory_limit)

    def _colour(self, trial: Trial) -> str:
        if self._is_best(trial):
            return OUR_COLOUR
        if not trial.fits(self.result.memory_limit):
            return _BEYOND
        return _BASELINE if trial.is_baseline else _WITHIN

    @property
    def _unit(self) -> tuple[int, str]:
        highest = max(trial.memory or 0 for trial in self.shown)
        units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
        return next((unit for unit in units if highest >= unit[0]), (1, "B"))

    @property
    def _varied(self) -> list[str]:
        """The names in which the trials differ."""
        choices = [trial.choice for trial in self.shown]
        return [name for name in choices[0] if len({key_of({name: choice[name]}) for choice in choices}) > 1]


def _source(result: SearchResult) -> str:
    device = "" if result.baseline is None else f"{result.baseline.device}\n"
    colours = "Orange: the best within the limit. Dark: the baseline. Hollow: over the limit. Line: no trial has more "
    return f"{device}{colours}throughput with as little memory."
