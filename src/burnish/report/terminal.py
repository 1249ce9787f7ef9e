"""An Explanation on a terminal: at most 100 columns, the costly rows one by one and the rest summed up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from burnish._text import human_us
from burnish.report import digest, sentences
from burnish.report.blocked import blocked
from burnish.report.data import Block, Explanation, Profile

if TYPE_CHECKING:
    from rich.console import RenderableType

_PARTS, _ROWS, _REWRITES = 5, 8, 10  # lines of a table before it sums up
_QUIET, _GOOD, _HEADING = "dim", "green", "bold cyan"
_STYLES = {digest.UNATTRIBUTED: _QUIET, digest.END_TO_END: "bold"}


def render(explanation: Explanation) -> list[RenderableType]:
    """Everything for `Console.print`, one renderable after the other; plain where there is no colour."""
    shown = explanation.after or explanation.before
    versions = [explanation.before] + ([explanation.after] if explanation.after else [])
    parts: list[RenderableType] = [Text(sentences.summary(explanation))]
    if how := sentences.how(explanation):
        parts.append(Text(how.replace("`", "")))
    about = filter(None, (", ".join(explanation.inputs) or "none", sentences.conditions(explanation)))
    parts.append(Text(f"Inputs: {'; '.join(about)}", style=_QUIET))
    unit = digest.unit_of(explanation)
    parts += _section("Where the time of a call goes", f"{unit.name}, {'predicted' if shown.predicted else 'measured'}")
    parts.append(_blocks_compared(explanation, unit) if explanation.after else _blocks(explanation, unit))
    parts += _section("What costs most", f"{shown.version}, all places together")
    parts.append(_costs(shown, unit))
    for profile in versions:
        parts += _section(f"Ops, {profile.version}", "one place of each; the costliest first")
        parts += _ops(profile, unit)
    if explanation.opportunities:
        title = "What was fused" if digest.is_done(explanation) else "What can be fused"
        parts += _section(title, "at all places together; by what it saves")
        parts += _opportunities(explanation, unit)
    parts += [Text(f"Note: {note}", style=_QUIET) for note in explanation.notes]
    return parts


def _section(title: str, about: str) -> list[RenderableType]:
    return ["", Text.assemble((title, _HEADING), "  ", (about, _QUIET))]


def _table(*columns: tuple[str, int], gap: int = 2) -> Table:
    """Columns (title, width): a title that begins with > is a number's; what is too long ends in an ellipsis."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style=_QUIET)
    for title, width in columns:
        right = title.startswith(">")
        table.add_column(
            title.removeprefix(">"),
            justify="right" if right else "left",
            width=width,
            no_wrap=True,
            overflow="ellipsis",
        )
    return table


def _add(table: Table, *cells: str | Text, style: str = "") -> None:
    """Cells as they are: what stands in brackets ("float32[2, 8]") is no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells), style=style)


# --- the call as a whole ----------------------------------------------------------------------------------------------


def _blocks(explanation: Explanation, unit: digest.Unit) -> Table:
    whole = explanation.before.end_to_end_us
    table = _table(("block", 44), (">time", 11), (">of call", 7), (">floor", 10), (">of floor", 8), (">kernels", 7))
    for line in digest.lines(explanation):
        found = line.shown
        floor = unit(found.floor_us) if found.floor_us else ""
        shares = digest.percent(found.us, whole), floor, digest.share_of_floor(found.floor_us, found.us)
        _add(table, line.name, unit(found.us), *shares, _count(found.launches), style=_STYLES.get(line.name, ""))
    return table


def _blocks_compared(explanation: Explanation, unit: digest.Unit) -> Table:
    table = _table(("block", 38), (">before", 11), (">after", 11), (">speedup", 8), (">of floor", 8), (">kernels", 14))
    for line in digest.lines(explanation):
        old, new = line.before, line.shown
        faster = line.speedup or 1.0
        speedup = Text(f"{faster:.2f}x" if line.speedup else "", _GOOD if faster > 1 else "red" if faster < 1 else "")
        launches = f"{old.launches:,} -> {new.launches:,}" if old.launches or new.launches else ""
        cells = unit(old.us), unit(new.us), speedup, digest.share_of_floor(new.floor_us, new.us), launches
        _add(table, line.name, *cells, style=_STYLES.get(line.name, ""))
    return table


def _count(launches: int) -> str:
    return f"{launches:,}" if launches else ""


def _costs(profile: Profile, unit: digest.Unit) -> Table:
    table = _table(("", 1), ("part", 34), ("", 4), ("ops", 23), (">time", 11), (">of call", 7), (">of floor", 8))
    found = digest.parts(profile)
    for place, part in enumerate(found[:_PARTS], start=1):
        ops = ", ".join(part.ops) or sentences.unattributed_to(profile)
        times = f"x {part.count}" if part.count > 1 else ""
        shares = digest.percent(part.us, profile.end_to_end_us), digest.share_of_floor(part.floor_us, part.us)
        _add(
            table,
            str(place),
            _tail(part.name, 34),
            times,
            ops,
            unit(part.us),
            *shares,
            style="bold" if place <= 3 else "",
        )
    if rest := found[_PARTS:]:
        us = sum(part.us for part in rest)
        share = digest.percent(us, profile.end_to_end_us)
        _add(table, "", f"{len(rest)} more", "", "", unit(us), share, "", style=_QUIET)
    return table


# --- the ops ----------------------------------------------------------------------------------------------------------


def _ops(profile: Profile, unit: digest.Unit) -> Iterator[RenderableType]:
    large, rest = digest.large_blocks(profile)
    for place, block in enumerate(large):
        if place:
            yield ""
        share = digest.percent(block.us * block.count, profile.end_to_end_us)
        each = f"{human_us(block.us)} each, " if block.count > 1 else ""
        about = f"{each}{human_us(block.us * block.count)} together, {share} of the call"
        yield Text.assemble((digest.block_title(block), "bold"), "  ", (about, _QUIET))
        yield _block_ops(block, unit, with_header=not place)
    if rest:
        us = sum(block.us * block.count for block in rest)
        blocks = f"{len(rest)} more blocks" if len(rest) > 1 else digest.block_title(rest[0])
        yield ""
        yield Text(f"{blocks}, {human_us(us)} ({digest.percent(us, profile.end_to_end_us)} of the call)", style=_QUIET)


def _block_ops(block: Block, unit: digest.Unit, with_header: bool) -> Table:
    table = _table(
        ("op", 30), ("source", 20), ("output", 17), (">time", 8), (">floor", 5), ("bound", 7), (">kernels", 7), gap=1
    )
    table.show_header = with_header
    shown, rest = digest.costliest(block.rows, _ROWS)
    for row in shown:
        name = digest.op_name(row.op)
        room = 30 - 2 - len(name)
        what = Text.assemble(name, "  ", (_tail(row.module, room), _QUIET)) if room >= 8 else Text(name)
        share = digest.share_of_floor(row.floor_us, row.shown_us)
        launches = _count(digest.launches(row))
        source, output = _tail(row.source, 20), digest.short_shape(row.output)
        _add(table, what, source, output, unit(row.shown_us), share, row.bound, launches)
    if rest:
        us = sum(row.shown_us for row in rest)
        _add(table, f"{len(rest)} more ops", "", "", unit(us), "", "", "", style=_QUIET)
    return table


def _tail(text: str, width: int) -> str:
    """Of a path and of a source, the end is what tells most."""
    return text if len(text) <= width else f"\N{HORIZONTAL ELLIPSIS}{text[1 - width :]}"


# --- the rewrites -----------------------------------------------------------------------------------------------------


def _opportunities(explanation: Explanation, unit: digest.Unit) -> Iterator[RenderableType]:
    found = digest.possible(explanation.opportunities)
    places, makes = digest.places(explanation), digest.makes(explanation)
    done = digest.is_done(explanation)
    if found:
        room = 20 if done else 32
        columns = [("rewrite", 21), ("makes", 25), (">", 4), ("where", room), (">predicted", 10)]
        table = _table(*columns, *([(">measured", 10)] if done else []))
        for each in found[:_REWRITES]:
            times = f"{each.count} x" if each.count > 1 else ""
            savings = [unit(us) for us in (each.saves_us, each.saved_us) if us is not None]
            _add(table, each.rewrite, makes[each].replace("by a ", ""), times, _tail(places[each], room), *savings)
        if rest := found[_REWRITES:]:
            _add(table, f"{len(rest)} more", "", "", "", unit(sum(each.saves_us for each in rest)), style=_QUIET)
        yield table
        if sentences.counts_once(explanation):
            yield Text(sentences.COUNTED_ONCE, style=_QUIET)
    misses = blocked(explanation)
    for miss in misses[:_REWRITES]:
        times = f", {miss.count} x" if miss.count > 1 else ""
        yield Text.assemble(("blocked ", "yellow"), f"{miss.rewrite}{times} in {miss.where}: ", (miss.reason, _QUIET))
    if others := misses[_REWRITES:]:
        yield Text(f"{len(others)} more are blocked", style=_QUIET)
