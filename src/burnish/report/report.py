"""`Report`: what was done to a model and what it costs now, as tables for people and as data for machines."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish._text import human_us, plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

    from burnish.schedule import Schedule, Served
    from burnish.tuning import Choice

SCHEMA = 1


class Report:
    """What a Schedule did. `print(report)` shows it; `to_dict()` and `to_json()` give the same as data."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.model = type(schedule.model).__name__
        self.history = list(schedule.history)
        self.served = list(schedule.served)
        self.verifications = schedule.verifications
        self.quantizations = list(schedule.quantizations)
        self.perplexity = schedule.perplexity

    # --- data -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; `schema` counts up when its form changes."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "summary": self.summary(),
            "steps": [asdict(record) for record in self.history],
            "quantized": [
                {
                    "kind": each.kind,
                    "products": each.products,
                    "bytes_before": each.bytes_before,
                    "bytes_after": each.bytes_after,
                    "difference": each.difference,
                }
                for each in self.quantizations
            ],
            "perplexity": self.perplexity,
            "signatures": [asdict(served) for served in self.served],
            "verified": [
                {
                    "node": unit.node.name,
                    "ops": unit.ops,
                    "ok": unit.verdict.ok,
                    "error": unit.verdict.error,
                    "eager_error": unit.verdict.eager_error,
                    "allowed": unit.verdict.allowed,
                }
                for verification in self.verifications
                for unit in verification.units
                if unit.verdict is not None
            ],
        }

    def to_json(self, path: str | Path) -> Path:
        """Writes `to_dict()` to `path`."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=2, default=str) + "\n")
        return path

    def summary(self) -> str:
        """What came of it, in a sentence or two."""
        if not self.served:
            return f"{self.model}: nothing has been called yet."
        timed = next((served for served in self.served if served.original_us and served.optimized_us), None)
        sentences = []
        if timed is None:
            reason = self.served[0].kept_original
            sentences.append(f"{self.model} runs as it was: {reason}." if reason else f"{self.model}: not timed.")
        elif timed.kept_original:
            sentences.append(f"{self.model} runs as it was: {timed.kept_original}.")
        else:
            before, after = timed.original_us or 0.0, timed.optimized_us or 1.0
            sentences.append(
                f"{self.model} is {before / after:.2f}x as fast as before: "
                f"{human_us(before)} -> {human_us(after)} a call at {_shapes_text(timed)}."
            )
        units = [unit for verification in self.verifications for unit in verification.units]
        if units:
            passed = sum(unit.verdict is not None and unit.verdict.ok for unit in units)
            sentences.append(f"{passed} of {len(units)} rewritten values are within what eager's own error allows.")
        if self.quantizations:
            sentences.append(f"{self.quantized()}.")
        return " ".join(sentences)

    def quantized(self) -> str:
        """What was quantized and what that changed, in a line; of the first Program. Empty where nothing was."""
        said = [str(self.quantizations[0])] if self.quantizations else []
        if said and self.perplexity is not None:
            before, after = self.perplexity
            said.append(f"perplexity {before:.4g} -> {after:.4g} ({after / before - 1:+.2%})")
        return "; ".join(said)

    # --- tables -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return plain(*self._parts(), width=110)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _parts(self) -> list[RenderableType]:
        from rich.text import Text

        parts: list[RenderableType] = [Text(self.summary()), "", self._steps()]
        if any(served.choices for served in self.served):
            parts += ["", self._impls()]
        if self.served:
            parts += ["", self._signatures()]
        misses = [(record.name, miss) for record in self.history for miss in record.near_misses]
        if misses:
            parts += ["", self._near_misses(misses)]
        return parts

    def _steps(self) -> RenderableType:
        table = _table("What was done", "step", "what matched", "nodes", "time")
        for record in self.history:
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

    def _impls(self) -> RenderableType:
        served = next(served for served in self.served if served.choices)
        table = _table(f"Impls chosen at {_shapes_text(served)}", "Op", "calls", "Impl", "one call", "passed over")
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

    def _signatures(self) -> RenderableType:
        table = _table("Calls served", "inputs", "before", "after", "speedup", "set up in", "note")
        for served in self.served:
            before, after = served.original_us, served.optimized_us
            _add_row(
                table,
                _shapes_text(served),
                human_us(before) if before else "",
                human_us(after) if after else "",
                f"{before / after:.2f}x" if before and after else "",
                human_us(served.seconds * 1e6),
                served.kept_original or served.not_captured or ("CUDA graph" if served.cuda_graph else ""),
            )
        return table

    def _near_misses(self, misses: list[tuple[str, str]]) -> RenderableType:
        table = _table("Almost matched", "step", "where and why not")
        for (step, reason), count in Counter(misses).items():
            _add_row(table, step, reason if count == 1 else f"{reason} ({count} times)")
        return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column in ("calls", "one call", "before", "after", "speedup", "time", "set up in", "nodes")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
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
    return [f"{impl}{ways[impl]}: {human_us(us) if math.isfinite(us) else 'failed'}" for us, impl, _ in slower] + [
        f"{name}: {'; '.join(reasons)}" for name, reasons in choice.rejected.items()
    ]


def _shapes_text(served: Served) -> str:
    shapes = dict.fromkeys("x".join(map(str, shape)) or "scalar" for shape in served.shapes.values())
    return ", ".join(shapes) or "no tensors"
