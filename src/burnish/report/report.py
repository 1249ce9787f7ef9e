"""`Report`: where a model's time goes, what was done to it and what that brought, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish._text import human_us, plain
from burnish.report import tables
from burnish.report.data import Explanation, Profile

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from burnish.serving import Serving

SCHEMA = 4
_WIDTH = 100


class Report:
    """What is known about a model. `print(report)` shows it; `to_dict()` and `to_json()` give the same as data;
    `to_html()`, `to_markdown()`, `to_svg()` and `to_trace()` show the profile.

    `burnish.explain` makes one with a profile of the model as it is. `fast.report()` makes one of what was done, and
    `fast.report(args, kwargs)` adds the profiles before and after.

    Attributes:
        explanation: the profiles, and what can be fused or was; None where nothing was profiled.
        history, served, verifications, quantizations, perplexity: the Serving's; empty where nothing was optimized.
    """

    def __init__(self, serving: Serving | None = None, explanation: Explanation | None = None) -> None:
        self.explanation = explanation
        self.model = type(serving.model).__name__ if serving is not None else explanation.model if explanation else ""
        self._optimized = serving is not None
        self.history = list(serving.history) if serving else []
        self.served = list(serving.served) if serving else []
        self.verifications = serving.verifications if serving else []
        self.quantizations = list(serving.quantizations) if serving else []
        self.perplexity = serving.perplexity if serving else None

    # --- data -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; `schema` counts up when its form changes. docs/explain.md describes it."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "summary": self.summary(),
            "explanation": None if self.explanation is None else _explanation_data(self.explanation),
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
        return _write(path, json.dumps(self.to_dict(), indent=2, default=str) + "\n")

    def to_html(self, path: str | Path) -> Path:
        """Writes one page to `path` that needs no network: charts, tables, graphs. ValueError without a profile."""
        from burnish.report.html import render

        return _write(path, render(self._profiled("to_html")))

    def to_markdown(self, path: str | Path) -> Path:
        """Writes tables to `path`, for an issue or a pull request. ValueError without a profile."""
        from burnish.report.markdown import render

        return _write(path, render(self._profiled("to_markdown")))

    def to_trace(self, path: str | Path) -> Path:
        """Writes the kernels of the costliest block to `path`, for Perfetto or chrome://tracing. ValueError without a
        profile."""
        from burnish.report.trace import trace_events

        return _write(path, json.dumps(trace_events(self._profiled("to_trace"))) + "\n")

    def to_svg(self, path: str | Path) -> Path:
        """Writes the graphs of the costliest block to `path`, before and after side by side. ValueError without a
        profile."""
        from burnish.report.svg import render

        return _write(path, render(self._profiled("to_svg")))

    def _profiled(self, method: str) -> Explanation:
        if self.explanation is None:
            raise ValueError(f"{method}: nothing was profiled; give report(args, kwargs) the inputs of a call")
        return self.explanation

    # --- text -------------------------------------------------------------------------------------

    def summary(self) -> str:
        """What came of it, in a few sentences. Where the profile was taken, its times are told; else those that the
        first calls were measured with."""
        if self.explanation is None:
            return " ".join([self._speed(), *self._checked()])
        from burnish.report import sentences

        return " ".join([sentences.summary(self.explanation), *self._checked()])

    def _speed(self) -> str:
        """What the first calls that were timed gave."""
        if not self.served:
            return f"{self.model}: nothing has been called yet."
        timed = next((served for served in self.served if served.original_us and served.optimized_us), None)
        kept = (timed or self.served[0]).kept_original
        if kept:
            return f"{self.model} runs as it was: {kept}."
        if timed is None:
            return f"{self.model}: not timed."
        before, after = timed.original_us or 0.0, timed.optimized_us or 1.0
        times = f"{human_us(before)} -> {human_us(after)} a call at {tables.shapes_text(timed)}"
        return f"{self.model} is {before / after:.2f}x as fast as before: {times}."

    def _checked(self) -> list[str]:
        """How exact it is, in up to two sentences."""
        sentences = []
        units = [unit for verification in self.verifications for unit in verification.units]
        if units:
            passed = sum(unit.verdict is not None and unit.verdict.ok for unit in units)
            sentences.append(f"{passed} of {len(units)} rewritten values are within what eager's own error allows.")
        if self.quantizations:
            sentences.append(f"{self.quantized()}.")
        return sentences

    def quantized(self) -> str:
        """What was quantized and what that changed, in a line; of the first Program. Empty where nothing was."""
        said = [str(self.quantizations[0])] if self.quantizations else []
        if said and self.perplexity is not None:
            before, after = self.perplexity
            said.append(f"perplexity {before:.4g} -> {after:.4g} ({after / before - 1:+.2%})")
        return "; ".join(said)

    def __str__(self) -> str:
        return plain(*self._parts(), width=_WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _parts(self) -> list[RenderableType]:
        parts: list[RenderableType] = []
        if self.explanation is not None:
            from burnish.report.terminal import render

            parts += render(self.explanation)
        return parts + self._done() if self._optimized else parts

    def _done(self) -> list[RenderableType]:
        """Beneath a profile, which tells the speed, only what it does not tell."""
        from rich.text import Text

        profiled = self.explanation is not None
        said = " ".join(self._checked()) if profiled else self.summary()
        parts: list[RenderableType] = [""] if profiled else []
        if said:
            parts += [Text(said), ""]
        parts.append(tables.steps(self.history))
        units = [unit for verification in self.verifications for unit in verification.units]
        if units:
            parts += ["", tables.numerics(units)]
        chosen = next((served for served in self.served if served.choices), None)
        if chosen is not None:
            parts += ["", tables.impls(chosen)]
        if self.served:
            parts += ["", tables.signatures(self.served)]
        if any(record.near_misses for record in self.history):
            parts += ["", tables.near_misses(self.history)]
        return parts


def _explanation_data(explanation: Explanation) -> dict[str, Any]:
    """As it is, and of each profile the sums, which a reader of JSON would have to work out."""
    data = asdict(explanation)
    for name in ("before", "after"):
        profile: Profile | None = getattr(explanation, name)
        if profile is not None:
            sums = ("attributed_us", "unattributed_us", "floor_us", "launches")
            data[name] |= {key: getattr(profile, key) for key in sums}
    return data


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.write_text(text, encoding="utf-8")
    return path
