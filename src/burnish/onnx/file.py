"""`OnnxFile`: what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish._text import human_bytes, plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from burnish.onnx.check import Checked


@dataclass(frozen=True)
class OnnxFile:
    """A file and what is in it.

    Attributes:
        path: the model; data: beside it the file with its weights, where they are not in it.
        opset: ONNX's version; bytes: of both files.
        inputs, outputs: "int64[batch, sequence]" by name.
        functions: how often each Op's functions are called, by the Op's name.
        operators: how often each standard operator stands in the graph itself.
        in_functions: how often each does in the functions' bodies, over all their calls.
        checked: where ONNX Runtime was compared with the module, and what came of it; empty without `check`.
        seconds: how long all of it took.
    """

    path: Path
    data: Path | None
    opset: int
    bytes: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    functions: Mapping[str, int]
    operators: Mapping[str, int]
    in_functions: Mapping[str, int]
    checked: tuple[Checked, ...]
    seconds: float

    @property
    def nodes(self) -> int:
        """Of the graph, each call of a function being one."""
        return sum(self.functions.values()) + sum(self.operators.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return asdict(self) | {"path": str(self.path), "data": self.data and str(self.data), "nodes": self.nodes}

    def __str__(self) -> str:
        return plain(*self._parts(), width=100)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _parts(self) -> list[RenderableType]:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        weights = f", weights in {self.data.name}" if self.data else ""
        for heading, lines in (
            ("inputs", [f"{name}: {kind}" for name, kind in self.inputs.items()]),
            ("outputs", [f"{name}: {kind}" for name, kind in self.outputs.items()]),
            ("functions", [_counts(self.functions) or "none: standard operators only"]),
            ("inside them", [_counts(self.in_functions)] if self.functions else []),
            ("operators", [_counts(self.operators)] if self.operators else []),
            ("checked", [_comparison(each) for each in self.checked] or ["not at all"]),
        ):
            if lines:
                table.add_row(heading, Text("\n".join(_shortened(lines))))
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        size = f"opset {self.opset}, {nodes}, {human_bytes(self.bytes)}{weights}"
        return [Text(f"{self.path}: {size}; written in {self.seconds:.1f} s"), table]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _comparison(checked: Checked) -> str:
    sizes = ", ".join(f"{word} {size}" for word, size in checked.sizes.items())
    return f"{sizes}: error {checked.error:.2g}, {checked.allowed:.2g} allowed (eager's own {checked.eager_error:.2g})"


def _shortened(lines: list[str]) -> list[str]:
    """A cache has many alike."""
    return lines if len(lines) <= 7 else [*lines[:4], f"... {len(lines) - 5} more", lines[-1]]
