"""The demo's figures on a terminal: at most 100 columns, plain where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from burnish._text import human_us

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.demo import Demo, Neighbour

WIDTH = 98
_SENTENCE = 36  # columns for a sentence
_BAR = 30
_BEFORE, _AFTER, _QUIET = "yellow", "green", "dim"


def render(demo: Demo) -> RenderableType:
    """The whole page."""
    return Group(
        *_title(demo),
        *_section("What it computes", "each sentence's nearest neighbour, by cosine of their embeddings"),
        _similarities(demo),
        _embeddings(demo),
        *_section("What was rewritten", f"one graph for every batch and length, in {human_us(demo.seconds * 1e6)}"),
        _steps(demo),
        _impls(demo),
        *_section("Where the time goes", "one call at 1 x 128 tokens under PyTorch's profiler, which adds a little to each operator"),
        _shares(demo),
        *_section("How fast it is", "median of one call; the ratio of blocks timed in turns"),
        _speeds(demo),
        "",
        _ending(demo),
    )


def _title(demo: Demo) -> Iterator[RenderableType]:
    count = demo.parameters / 1e6
    yield Text.assemble(("all-MiniLM-L6-v2", "bold"), f", {count:.1f} million parameters, float32, before and after burnish.optimize")
    yield Text(f"{demo.device}, torch {demo.versions['torch']}", style=_QUIET)


def _section(title: str, about: str) -> Iterator[RenderableType]:
    yield ""
    yield Text.assemble((title, "bold cyan"), "  ", (about, _QUIET))


def _table(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style=_QUIET, width=None)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _similarities(demo: Demo) -> RenderableType:
    table = _table("sentence", "nearest before", "", "nearest after", "")
    for index, (before, after) in enumerate(zip(demo.before, demo.after, strict=True)):
        same = before.index == after.index
        table.add_row(
            _sentence(demo, index),
            _sentence(demo, before.index),
            _cosine(before),
            "same" if same else Text(demo.sentences[after.index], style="red"),
            _cosine(after),
        )
    return table


def _sentence(demo: Demo, index: int) -> Text:
    text = Text(demo.sentences[index])
    text.truncate(_SENTENCE, overflow="ellipsis")
    return text


def _cosine(neighbour: Neighbour) -> str:
    return f"{neighbour.cosine:.4f}"


def _embeddings(demo: Demo) -> RenderableType:
    found = demo.embeddings
    verdict = "as exact as the rule allows" if found.ok else "NOT as exact as the rule allows"
    return Text.assemble(
        f"The embeddings differ by {found.largest_difference:.1e} at most. Against float64, the error was "
        f"{found.original_error:.1e} and is {found.error:.1e}: ",
        (verdict, _AFTER if found.ok else "red"),
        ".",
    )


def _steps(demo: Demo) -> RenderableType:
    table = _table("step", "what it did", ">nodes")
    for record in demo.steps:
        done = [f"{count} {name}" for name, count in record.matches.items() if count]
        lines = [", ".join(done)] if done else []
        nodes = f"{record.nodes_before} -> {record.nodes_after}" if record.nodes_before != record.nodes_after else ""
        table.add_row(record.name, "\n".join([*lines, *record.numerics, *record.notes]) or "nothing", nodes)
    return table


def _impls(demo: Demo) -> RenderableType:
    chosen = ", ".join(f"{count} {op} by {impl}" for op, impl, count in demo.impls)
    return Text.assemble(("Measured fastest at 1 x 128: ", _QUIET), f"{chosen}.")


def _shares(demo: Demo) -> RenderableType:
    table = _table("", ">before", "", ">after", "")
    longest = max(max(share.before_us, share.after_us) for share in demo.shares)
    for share in demo.shares:
        table.add_row(
            share.part,
            human_us(share.before_us),
            _bar(share.before_us / longest, _BEFORE),
            human_us(share.after_us),
            _bar(share.after_us / longest, _AFTER),
        )
    before, after = (sum(getattr(share, side) for share in demo.shares) for side in ("before_us", "after_us"))
    table.add_row(*(Text(cell, style="bold") for cell in ("together", human_us(before), "", human_us(after), "")))
    return table


def _bar(share: float, style: str, width: int = _BAR // 2 + 4) -> Text:
    return Text("#" * max(round(share * width), 1 if share > 0 else 0), style=style)


def _speeds(demo: Demo) -> RenderableType:
    table = _table("input", ">before", ">after", ">speedup", "")
    for speed in demo.speeds:
        table.add_row(
            f"{speed.batch} x {speed.seq} tokens",
            human_us(speed.before_us),
            human_us(speed.after_us),
            Text(f"{speed.speedup:.2f}x", style=f"bold {_AFTER if speed.speedup >= 1 else 'red'}"),
            Text("-" * round(speed.speedup * 10), style=_AFTER),
        )
    return table


def _ending(demo: Demo) -> RenderableType:
    if demo.kept_original is not None:
        return Text(f"The original stays in use: {demo.kept_original}.", style="yellow")
    return Text("In your own code: fast = burnish.optimize(model)", style="bold")
