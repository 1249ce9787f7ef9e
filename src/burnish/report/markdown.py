"""An Explanation as GitHub's Markdown, for an issue or a pull request. Names stand as code, so that none is markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from burnish._text import human_us
from burnish.report import digest, sentences
from burnish.report.blocked import blocked
from burnish.report.data import Block, Explanation, Opportunity, Profile

_PARTS, _ROWS = 10, 20  # rows of a table before it sums up


def render(explanation: Explanation) -> str:
    """The whole, ending in a newline; tables of ops are folded away (`<details>`)."""
    shown, unit = explanation.after or explanation.before, digest.unit_of(explanation)
    lines = [_text(sentences.summary(explanation)), ""]
    if how := sentences.how(explanation):
        lines += [how, ""]
    inputs = ", ".join(map(_code, explanation.inputs)) or "none"
    about = filter(None, (inputs, _text(sentences.conditions(explanation))))
    lines.append(f"Inputs: {'; '.join(about)}")
    lines += ["", "### Where the time of a call goes", "", *_blocks(explanation, unit)]
    lines += ["", f"### What costs most, {_text(shown.version)}", "", *_costs(shown, unit)]
    if explanation.opportunities:
        lines += ["", "### What was fused" if digest.is_done(explanation) else "### What can be fused", ""]
        lines += _opportunities(explanation, unit)
    lines += ["", "### Ops"]
    for profile in filter(None, (explanation.before, explanation.after)):
        lines += _ops(profile, unit)
    lines += ["", *(f"- {_text(note)}" for note in explanation.notes)] if explanation.notes else []
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Titles that begin with > are of numbers."""
    rule = ["--:" if title.startswith(">") else "---" for title in header]
    titles = [title.removeprefix(">") for title in header]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def _code(text: str) -> str:
    """`text` as code, whatever is in it: a fence longer than any in it, no line breaks, no pipe that ends a cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _text(text: str) -> str:
    """`text` without markup, HTML, line breaks or mentions of people (`@name`)."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("@", "@<!-- -->")


def _blocks(explanation: Explanation, unit: digest.Unit) -> list[str]:
    header = ["block", f">{unit.name}", ">of the call", f">floor, {unit.name}", ">of floor", ">kernels"]
    if explanation.after:
        header[1:3] = [f">before, {unit.name}", f">after, {unit.name}", ">speedup"]
    rows = []
    for line in digest.lines(explanation):
        found = line.shown
        cells = [unit(found.us), digest.percent(found.us, explanation.before.end_to_end_us)]
        if explanation.after:
            cells = [unit(line.before.us), unit(found.us), f"{line.speedup:.2f}x" if line.speedup else ""]
        cells += [unit(found.floor_us) if found.floor_us else "", digest.share_of_floor(found.floor_us, found.us)]
        cells += [f"{found.launches:,}" if found.launches else ""]
        if line.name == digest.END_TO_END:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        rows.append([_title(line.block) if line.block else line.name, *cells])
    return _table(header, rows)


def _title(block: Block) -> str:
    about = f"{block.count} x {_code(block.kind)}" if block.count > 1 else _code(block.kind)
    return f"{_code(block.path)} ({about})" if block.path else about


def _costs(profile: Profile, unit: digest.Unit) -> list[str]:
    found = digest.parts(profile)
    rows = []
    for place, part in enumerate(found[:_PARTS], start=1):
        name = _code(part.name) if part.rows else f"{digest.UNATTRIBUTED} ({sentences.unattributed_to(profile)})"
        places = f" x {part.count}" if part.count > 1 else ""
        share, floor = digest.percent(part.us, profile.end_to_end_us), digest.share_of_floor(part.floor_us, part.us)
        rows.append((str(place), name + places, _code(", ".join(part.ops)), unit(part.us), share, floor))
    if rest := found[_PARTS:]:
        us = sum(part.us for part in rest)
        rows.append(("", f"{len(rest)} more", "", unit(us), digest.percent(us, profile.end_to_end_us), ""))
    return _table([">", "part", "ops", f">{unit.name}, all places", ">of the call", ">of floor"], rows)


def _ops(profile: Profile, unit: digest.Unit) -> Iterator[str]:
    large, others = digest.large_blocks(profile)
    for block in large:
        times = f", {block.count} x {human_us(block.us)}" if block.count > 1 else f", {human_us(block.us)}"
        title = f"{profile.version}: {digest.block_title(block)}{times}"
        yield from ("", f"<details><summary>{_html(title)}</summary>", "")
        shown, rest = digest.costliest(block.rows, _ROWS)
        rows = []
        for row in shown:
            kernels = ", ".join(f"{kernel.launches:.0f} x {digest.kernel_name(kernel.name)}" for kernel in row.kernels)
            what = (row.op, row.module, row.source, row.output)
            share = digest.share_of_floor(row.floor_us, row.shown_us)
            rows.append((*map(_code, what), unit(row.shown_us), share, row.bound, _code(kernels)))
        if rest:
            rows.append((f"{len(rest)} more", "", "", "", unit(sum(row.shown_us for row in rest)), "", "", ""))
        header = ["op", "module", "source", "output", f">{unit.name}", ">of floor", "bound", "kernels"]
        yield from _table(header, rows)
        yield from ("", "</details>")
    if others:
        us = sum(block.us * block.count for block in others)
        blocks = f"{len(others)} smaller blocks" if len(others) > 1 else _code(digest.block_name(others[0]))
        yield from ("", f"{_text(profile.version)}, not shown: {blocks}, {human_us(us)} together")


def _html(text: str) -> str:
    return html.escape(" ".join(text.split())).replace("@", "@<!-- -->")


def _made(each: Opportunity, said: str) -> str:
    """The whole name as code, and what is said besides."""
    return _code(each.op) + said.removeprefix(digest.op_name(each.op))


def _opportunities(explanation: Explanation, unit: digest.Unit) -> Iterator[str]:
    found, places = digest.possible(explanation.opportunities), digest.places(explanation)
    makes = digest.makes(explanation)
    if found:
        saves = f">saves, {unit.name}"
        header = ["rewrite", "makes", "where", f"{saves} (predicted)", f"{saves} (measured)"]
        rows = []
        for each in found:
            where = _code(places[each]) if each.count == 1 else f"{each.count} x {_code(places[each])}"
            saved = "" if each.saved_us is None else unit(each.saved_us)
            rows.append((_code(each.rewrite), _made(each, makes[each]), where, unit(each.saves_us), saved))
        yield from _table(header, rows)
        if sentences.counts_once(explanation):
            yield from ("", sentences.COUNTED_ONCE)
    if misses := blocked(explanation):
        yield from ("", "Blocked:", "")
        for miss in misses:
            times = f", {miss.count} x" if miss.count > 1 else ""
            yield f"- {_code(miss.rewrite)}{times} in {_code(miss.where)}: {_text(miss.reason)}"
