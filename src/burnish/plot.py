"""`plot_sweep`: time against size, a line for each variant. Draws with matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish._text import human_us
from burnish.sweep import OURS

if TYPE_CHECKING:
    from burnish.sweep import Sweep

# Okabe and Ito's colours, which people with any colour vision can tell apart; ours is the one that stands out.
OUR_COLOUR, FIRST = "#d55e00", "#595959"
OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d1f", "#7b5ea7")
INK, QUIET, GRID = "#1f2933", "#66727f", "#e4e8ec"
_INCHES, DOTS = (7.6, 6.0), 160
# Of the figure: left, bottom, width, height. Beside the lines are their labels, above the title, below the source.
_TIMES, _RATIOS = (0.085, 0.40, 0.665, 0.49), (0.085, 0.145, 0.665, 0.17)
_LABEL_GAP = 0.055  # of the height of the upper part: two labels closer than that would touch
SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """ValueError where matplotlib is missing, or cannot write such a file: before anything is measured."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a plot ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is missing: pip install 'burnish[plot]'") from None


def plot_sweep(sweep: Sweep, path: str | Path) -> Path:
    """Draws the medians, with bands from the 20th to the 80th percentile, and below how many times as fast as the first
    variant each one is; returns the path. Sizes and times are logarithmic: equal steps are equal factors.

    Raises ValueError where matplotlib is missing, for another suffix than .svg, .png or .pdf, and for a single size.
    """
    path = Path(path)
    check_plot(path)
    if len(sweep.results) < 2:
        raise ValueError("a plot of time against size wants two sizes at least")
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=_INCHES)
    times = figure.add_axes(_TIMES)
    ratios = figure.add_axes(_RATIOS, sharex=times)
    colours = _colours(sweep.variants)
    for name, colour in colours.items():
        _draw_variant(sweep, name, colour, times, ratios)
    if sweep.floors:
        times.plot(list(sweep.floors), list(sweep.floors.values()), color=QUIET, linewidth=1.2, linestyle=(0, (2, 2)))
    _style(sweep, times, ratios)
    _label_lines(sweep, colours, times)
    figure.text(0.015, 0.015, _source(sweep), ha="left", va="bottom", fontsize=7, color=QUIET, linespacing=1.4)
    # Tight: labels are as long as the variants' names.
    figure.savefig(path, dpi=DOTS, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return path


def _colours(variants: Sequence[str]) -> dict[str, str]:
    others = iter(OTHERS * (1 + len(variants) // len(OTHERS)))
    return {name: {variants[0]: FIRST, OURS: OUR_COLOUR}.get(name) or next(others) for name in variants}


def _draw_variant(sweep: Sweep, name: str, colour: str, times: Any, ratios: Any) -> None:
    medians = sweep.medians(name)
    timings = [sweep.results[size].timings[name] for size in medians]
    bands = [timing.p20_us for timing in timings], [timing.p80_us for timing in timings]
    times.fill_between(list(medians), *bands, color=colour, alpha=0.13, linewidth=0)
    width, marker, order = (2.4, 5.0, 3) if name == OURS else (1.6, 3.6, 2)
    line = {"color": colour, "linewidth": width, "marker": "o", "markersize": marker, "zorder": order}
    times.plot(list(medians), list(medians.values()), **line)
    ratios.plot(list(medians), [sweep.results[size].speedups[name] for size in medians], **line)


def _style(sweep: Sweep, times: Any, ratios: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    times.set_xscale("log")
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)))
    times.yaxis.set_major_formatter(FuncFormatter(lambda us, _: human_us(us)))
    ratios.set_ylim(0, 1.08 * max(max(result.speedups.values()) for result in sweep.results.values()))
    ratios.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ratios.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    times.xaxis.set_major_locator(FixedLocator(list(sweep.results)))
    times.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    for axes in (times, ratios):
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        style_axes(axes)
    times.tick_params(labelbottom=False)
    ratios.set_xlabel(sweep.axis, color=QUIET, fontsize=9.5)
    for axes, height, text in (
        (times, 1.04, sweep.about),
        (ratios, 1.12, f"times as fast as {sweep.variants[0]}"),
    ):
        axes.text(0, height, text, transform=axes.transAxes, fontsize=9, color=QUIET, va="bottom")
    title = {"fontsize": 13, "fontweight": "bold", "color": INK, "va": "bottom"}
    times.text(0, 1.11, f"{sweep.name}: time of a call", transform=times.transAxes, **title)


def style_axes(axes: Any) -> None:
    """Horizontal lines behind what is drawn, a line below it, quiet numbers."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9, length=3)
    axes.tick_params(axis="y", length=0)


def _label_lines(sweep: Sweep, colours: Mapping[str, str], times: Any) -> None:
    """Each line's name and last time at its right end, moved apart where they would touch."""
    last = max(sweep.results)
    ends = {name: us for name in colours if (us := sweep.medians(name).get(last)) is not None}
    if sweep.floors:
        ends["floor"] = sweep.floors[last]
    to_axes = times.transData + times.transAxes.inverted()
    heights = _apart({name: float(to_axes.transform((last, us))[1]) for name, us in ends.items()})
    for name, us in ends.items():
        times.annotate(
            f"{name}  {human_us(us)}",
            (1.015, heights[name]),
            xycoords="axes fraction",
            color=colours.get(name, QUIET),
            fontsize=9.5,
            fontweight="bold" if name == OURS else "normal",
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """The heights with `_LABEL_GAP` between neighbours: those that were closer stand around where they were."""
    groups: list[tuple[float, list[str]]] = []  # the middle and the names, from below
    for name in sorted(heights, key=heights.__getitem__):
        middle, names = heights[name], [name]
        while groups and middle - groups[-1][0] < _LABEL_GAP * (len(names) + len(groups[-1][1])) / 2:
            below = groups.pop()
            middle = (below[0] * len(below[1]) + middle * len(names)) / (len(below[1]) + len(names))
            names = below[1] + names
        groups.append((middle, names))
    return {
        name: middle + _LABEL_GAP * (place - (len(names) - 1) / 2)
        for middle, names in groups
        for place, name in enumerate(names)
    }


def _source(sweep: Sweep) -> str:
    result = next(iter(sweep.results.values()))
    told = ("torch", "triton") if result.device.kind == "cuda" else ("torch",)
    versions = [f"{name} {result.device.versions[name]}" for name in told if name in result.device.versions]
    device = "; ".join([result.device.label, *versions, result.date[:10]])
    return f"{device}\nMedians; the bands go from the 20th to the 80th percentile."
