"""The demo's figures on a terminal: at most 100 columns, plain where there is no colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from burnish._text import human_us

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.demo import Demo

_BAR = 24  # columns of a full bar
_HEAVY, _HEAVY_HALF = "\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS HEAVY LEFT}"
_BEFORE, _AFTER, _QUIET = "yellow", "green", "dim"


def render(demo: Demo) -> RenderableType:
    """The whole page."""
    return Group(
        *_title(demo),
        *_section(
            "What it computes", f"{len(demo.sentences)} sentences, padded to {demo.padded_to} tokens; nearest by cosine"
        ),
        _similarities(demo),
        "",
        _embeddings(demo),
        *_section("What was rewritten", f"once for every batch and length; it took {human_us(demo.seconds * 1e6)}"),
        _steps(demo),
        "",
        _impls(demo),
        *_section("Where the time goes", f"one call at {_tokens(*demo.profiled)}, under PyTorch's profiler"),
        _shares(demo),
        *_section("How fast it is", "median of one call without padding; both timed in turns"),
        _speeds(demo),
        "",
        _ending(demo),
    )


def _title(demo: Demo) -> Iterator[RenderableType]:
    count = demo.parameters / 1e6
    about = f", {count:.1f} million parameters, float32, before and after burnish.optimize"
    yield Text.assemble(("all-MiniLM-L6-v2", "bold"), about)
    yield Text(f"{demo.device}, torch {demo.versions['torch']}", style=_QUIET)


def _section(title: str, about: str) -> Iterator[RenderableType]:
    yield ""
    yield Text.assemble((title, "bold cyan"), "  ", (about, _QUIET))


def _table(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=_QUIET)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _tokens(batch: int, seq: int) -> str:
    return f"{batch} x {seq} tokens"


def _similarities(demo: Demo) -> RenderableType:
    table = _table("sentence", "nearest before", ">cosine", "after", ">cosine")
    for sentence, before, after in zip(demo.sentences, demo.before, demo.after, strict=True):
        same = before.index == after.index
        table.add_row(
            sentence,
            demo.sentences[before.index],
            f"{before.cosine:.4f}",
            "same" if same else Text(demo.sentences[after.index], style="red"),
            f"{after.cosine:.4f}",
        )
    return table


def _embeddings(demo: Demo) -> RenderableType:
    found = demo.embeddings
    return Text.assemble(
        f"Embeddings moved by {found.largest_difference:.1e} at most. Their error against float64 was "
        f"{found.original_error:.1e} and is {found.error:.1e}; {found.allowed:.1e} would pass: ",
        ("ok", _AFTER) if found.ok else ("WRONG", "bold red"),
    )


def _steps(demo: Demo) -> RenderableType:
    table = _table("step", "what it did", "nodes")
    for record in demo.steps:
        counts: Counter[str] = Counter()
        for name, count in record.matches.items():
            counts[name.split(":")[0]] += count
        done = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        nodes = f"{record.nodes_before} -> {record.nodes_after}" if record.nodes_before != record.nodes_after else ""
        lines = [line for line in (done, *record.numerics, *record.notes) if line]
        table.add_row(record.name, Text("\n".join(lines) or "nothing"), nodes)
    return table


def _impls(demo: Demo) -> RenderableType:
    by_op: dict[str, list[str]] = {}
    for op, impl, count in demo.impls:
        by_op.setdefault(op, []).append(f"{count} {impl}")
    chosen = "; ".join(f"{op}: {', '.join(impls)}" for op, impls in by_op.items())
    return Text.assemble((f"Measured fastest at {_tokens(*demo.profiled)}: ", _QUIET), chosen)


def _shares(demo: Demo) -> RenderableType:
    table = _table("", ">before", "", ">after", "")
    longest = max(max(share.before_us, share.after_us) for share in demo.shares)
    for share in demo.shares:
        table.add_row(
            share.part,
            human_us(share.before_us),
            _Bar(share.before_us / longest, _BEFORE),
            human_us(share.after_us),
            _Bar(share.after_us / longest, _AFTER),
        )
    before, after = (sum(getattr(share, side) for share in demo.shares) for side in ("before_us", "after_us"))
    table.add_row(*(Text(cell, style="bold") for cell in ("together", human_us(before), "", human_us(after), "")))
    return table


@dataclass(frozen=True)
class _Bar:
    """A bar of `share` of `_BAR` columns, in characters that the console can show."""

    share: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole, half = divmod(round(self.share * 2 * _BAR), 2)
        bar = "=" * whole if options.ascii_only else _HEAVY * whole + _HEAVY_HALF * half
        yield Text(bar, style=self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_BAR, _BAR)


def _speeds(demo: Demo) -> RenderableType:
    table = _table("input", ">before", ">after", ">speedup", "")
    fastest = max(speed.speedup for speed in demo.speeds)
    for speed in demo.speeds:
        table.add_row(
            _tokens(speed.batch, speed.seq),
            human_us(speed.before_us),
            human_us(speed.after_us),
            Text(f"{speed.speedup:.2f}x", style=f"bold {_AFTER if speed.speedup >= 1 else 'red'}"),
            _Bar(speed.speedup / fastest, _AFTER),
        )
    return table


def _ending(demo: Demo) -> RenderableType:
    if demo.kept_original is not None:
        sizes = _tokens(len(demo.sentences), demo.padded_to)
        return Text(f"For the sentences themselves, {sizes}, the original stays: {demo.kept_original}.", style="yellow")
    return Text("In your own code: fast = burnish.optimize(model)", style="bold")
