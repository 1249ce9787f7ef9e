"""The tables of what a Schedule did: its steps, what was verified, the Impls, the calls served, what almost matched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from burnish._text import human_us

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from burnish.record import StepRecord
    from burnish.served import Served
    from burnish.tuning import Choice
    from burnish.verify import Unit

_NUMBERS = (
    *("calls", "one call", "before", "after", "speedup", "time", "set up in", "nodes"),
    *("values", "error", "eager's own", "allowed"),
)


def steps(history: Iterable[StepRecord]) -> RenderableType:
    table = _table("What was done", "step", "what matched", "nodes", "time")
    for record in history:
        matched = [f"{count} x {name}" for name, count in record.matches.items() if count]
        lines = [*matched, *record.numerics, *record.notes]
        _add_row(
            table,
            record.name,
            "\n".join(lines) or "nothing",
            f"{record.nodes_before} -> {record.nodes_after}" if record.nodes_before else "",
            human_us(record.seconds * 1e6),
        )
    return table


def numerics(units: Sequence[Unit]) -> RenderableType:
    """By what stands there now, the worst of the values that were compared."""
    table = _table("What was verified, the worst value of each", "Ops", "values", "error", "eager's own", "allowed", "")
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.verdict is not None:
            groups.setdefault(" + ".join(dict.fromkeys(unit.ops)), []).append(unit)
    for ops, group in groups.items():
        verdicts = [unit.verdict for unit in group if unit.verdict is not None]
        worst = max(verdicts, key=lambda verdict: verdict.error / (verdict.allowed or math.inf))
        failed = sum(not verdict.ok for verdict in verdicts)
        numbers = (f"{value:.1e}" for value in (worst.error, worst.eager_error, worst.allowed))
        _add_row(table, ops, str(len(group)), *numbers, f"{failed} undone" if failed else "ok")
    return table


def impls(served: Served) -> RenderableType:
    table = _table(f"Impls chosen at {shapes_text(served)}", "Op", "calls", "Impl", "one call", "passed over")
    groups: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], Choice] = {}
    for slot, choice in served.choices.items():
        key = (slot.rpartition("_")[0], f"{choice.candidate}|{sorted(choice.times_us.items())}")
        groups[key] += 1
        example[key] = choice
    for key, count in groups.items():
        choice = example[key]
        time = choice.times_us.get(choice.candidate)
        _add_row(
            table,
            key[0],
            str(count),
            choice.candidate + ("" if choice.source in ("measured", "cached") else f" ({choice.source})"),
            human_us(time) if time else "",
            "\n".join(_passed_over(choice)) or "no other",
        )
    return table


def signatures(served: Iterable[Served]) -> RenderableType:
    """The times are those of the entry alone, taken when calls of these sizes were first served."""
    title = "Calls served, as timed when first served"
    table = _table(title, "inputs", "before", "after", "speedup", "set up in", "note")
    for each in served:
        before, after = each.original_us, each.optimized_us
        _add_row(
            table,
            shapes_text(each),
            human_us(before) if before else "",
            human_us(after) if after else "",
            f"{before / after:.2f}x" if before and after else "",
            human_us(each.seconds * 1e6),
            "; ".join(filter(None, [each.kept_original or each.not_captured, each.padding]))
            or ("CUDA graph" if each.cuda_graph else ""),
        )
    return table


def near_misses(history: Iterable[StepRecord]) -> RenderableType:
    table = _table("Almost matched", "step", "where and why not")
    misses = Counter((record.name, str(miss)) for record in history for miss in record.near_misses)
    for (step, miss), count in misses.items():
        _add_row(table, step, miss if count == 1 else f"{miss} (in {count} graphs)")
    return table


def shapes_text(served: Served) -> str:
    shapes = dict.fromkeys("x".join(map(str, shape)) or "scalar" for shape in served.shapes.values())
    return ", ".join(shapes) or "no tensors"


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Cells as they are: what stands in brackets in a reason ("float32[2, 8]") is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _passed_over(choice: Choice) -> list[str]:
    # Of an Impl that was tried in several ways, the best.
    best: dict[str, tuple[float, int]] = {}
    for name, us in choice.times_us.items():
        impl = name.split(" ")[0]
        before, tried = best.get(impl, (us, 0))
        best[impl] = (min(us, before), tried + 1)
    slower = sorted((us, impl, tried) for impl, (us, tried) in best.items() if impl != choice.impl)
    ways = {impl: f" (best of {tried})" if tried > 1 else "" for _, impl, tried in slower}
    timed = [f"{impl}{ways[impl]}: {human_us(us) if math.isfinite(us) else 'failed'}" for us, impl, _ in slower]
    # What keeps several away, that there is no GPU say, is told once, and then not what else does.
    shared: dict[str, list[str]] = {}
    for name, reasons in choice.rejected.items():
        shared.setdefault(reasons[0], []).append(name)
    for first, names in shared.items():
        timed.append(f"{', '.join(names)}: {first if len(names) > 1 else '; '.join(choice.rejected[names[0]])}")
    return timed
