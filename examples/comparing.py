"""Runs that differ in nothing but what ran the model: their losses as a result file, and as one picture."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from burnish._files import write_text
from burnish.hardware import device
from burnish.plot import FIRST, INK, OTHERS, OUR_COLOUR, QUIET, style_axes
from examples.checkpoints import Run

LOSSES, PICTURE = "training-loss.json", "training-loss.svg"
_INCHES, _LEFT, _WIDTH = (7.6, 5.6), 0.085, 0.665
_UPPER, _LOWER = (_LEFT, 0.40, _WIDTH, 0.47), (_LEFT, 0.135, _WIDTH, 0.17)
_COLOURS = {"eager": FIRST, "compile": OTHERS[0], "burnish": OUR_COLOUR, "optimize": OTHERS[1]}
_NAMES = {"compile": "torch.compile", "optimize": "burnish.optimize"}


def median_seconds(run: Run) -> float:
    """Of a step. The first stretch is left out where there are others: caches are cold then."""
    stretches = run.seconds[1:] or run.seconds
    return statistics.median([seconds for _, seconds in stretches])


def compare(path: Path, runs: Mapping[str, Run], command: str) -> None:
    """Write a record for each run, in the form of the benchmarks' results. ValueError where the runs differ in more
    than how they ran."""
    first = next(iter(runs.values()))
    for name, run in runs.items():
        if run.options != first.options.by(run.options.how) or run.text_sha256 != first.text_sha256:
            raise ValueError(f"{name}: its run was asked for something else than the first; begin in another --out")
    info = device(first.options.device, measure=False)
    records = [
        {
            "case": run.options.case,
            "variant": name,
            "step_ms": round(median_seconds(run) * 1e3, 3),
            "tokens_per_s": round(run.options.batch * run.options.context / median_seconds(run)),
            "prepared_s": round(run.prepared_s, 1),
            "peak_mib": None if run.peak_mib is None else round(run.peak_mib),
            "load": round(os.getloadavg()[0], 1),  # much above the threads: others took their time from these steps
            "losses": run.losses,
            "held_out": run.held_out,
            "device": info.label,
            "versions": info.versions,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
        }
        for name, run in runs.items()
    ]
    write_text(path, json.dumps(records, indent=1) + "\n")


def draw(results: Path, picture: Path) -> None:
    """The losses over each other, and below how far each run is from the first one."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    records: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    figure = Figure(figsize=_INCHES)
    losses = figure.add_axes(_UPPER)
    distances = figure.add_axes(_LOWER, sharex=losses)
    steps = range(1, len(records[0]["losses"]) + 1)
    # The first one is the widest and the last one dashed: where they are the same, all are seen.
    widths = [4.5 - 3.2 * i / max(1, len(records) - 1) for i in range(len(records))]
    for i, (record, width) in enumerate(zip(records, widths, strict=True)):
        line: dict[str, Any] = {"color": _colour(record), "alpha": 0.45 if i == 0 else 1.0}
        losses.plot(steps, record["losses"], linewidth=width, zorder=2 + i, **line)
        if i:
            apart = [abs(a - b) for a, b in zip(record["losses"], records[0]["losses"], strict=True)]
            distances.plot(steps, apart, linewidth=1.2, **line)
        _label(losses, record, i)
    distances.yaxis.set_major_locator(MaxNLocator(3))
    distances.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
    distances.set_xlabel("step", color=QUIET, fontsize=9.5)
    losses.tick_params(labelbottom=False)
    for axes, height, text in (
        (losses, 1.04, f"training loss, nats; {records[0]['case']}"),
        (distances, 1.10, f"distance of each loss to that of {_name(records[0])}, nats"),
    ):
        style_axes(axes)
        axes.text(0, height, text, transform=axes.transAxes, fontsize=9, color=QUIET, va="bottom")
    title: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": INK, "va": "bottom"}
    losses.text(0, 1.11, "The same training, run in several ways", transform=losses.transAxes, **title)
    figure.text(0.015, 0.015, _source(records[0]), ha="left", va="bottom", fontsize=7, color=QUIET)
    figure.savefig(picture, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def _name(record: Mapping[str, Any]) -> str:
    how, _, again = record["variant"].partition("-")
    name = _NAMES.get(how, how)
    return f"{name}, run {again}" if again else name


def _colour(record: Mapping[str, Any]) -> str:
    return _COLOURS.get(record["variant"], QUIET)


def _label(axes: Any, record: Mapping[str, Any], place: int) -> None:
    """At the right: the name, and the loss on text held out at the end."""
    colour = _colour(record)
    held_out = list(record["held_out"].values())[-1]
    height = 0.96 - 0.2 * place
    at: dict[str, Any] = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
    axes.annotate(_name(record), (1.03, height), color=colour, fontsize=9.5, fontweight="bold", **at)
    told = f"loss {record['losses'][-1]:.4f}, held out {held_out:.4f}"
    axes.annotate(told, (1.03, height - 0.075), color=QUIET, fontsize=8, **at)


def _source(record: Mapping[str, Any]) -> str:
    told = [f"{name} {record['versions'][name]}" for name in ("torch",) if name in record["versions"]]
    return "; ".join([record["device"], *told, record["date"][:10]])
