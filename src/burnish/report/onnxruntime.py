"""What ONNX Runtime makes of a file: its graph before and after its own optimizations, and where its time goes.

ONNX Runtime puts a function's body in the place of each call, and then fuses what it knows. Nodes that came from a
function keep its name, so that their time can be told by Op, and stood beside Burnish's own.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish._text import human_us, plain
from burnish.onnx.domain import DOMAIN

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

    from burnish.report.data import Profile

_WARM_UP, _RUNS = 3, 20
_INLINED = "_inlfunc_"  # begins the names of nodes that come from a function
_RAN = "_kernel_time"  # ends the names of a profile's events of nodes
_BEFORE, _AFTER = "before.onnx", "after.onnx"
_OTHERS = "other nodes"


@dataclass(frozen=True)
class OrtRow:
    """The nodes of one Op's functions, or those that belong to none.

    nodes: how often each kernel of ONNX Runtime runs for them in a call of the model.
    us: of all of them in one call. ours_us: what Burnish's calls of this Op take in one, where that is known.
    """

    op: str
    nodes: Mapping[str, int]
    us: float
    ours_us: float | None = None


@dataclass(frozen=True)
class OrtView:
    """ONNX Runtime on one file, on the CPU. Times are microseconds, one call's; `print(view)` shows it.

    before: operators of the graph as ONNX Runtime reads it, functions replaced by their bodies; after: of the graph
    that it runs. us: a call as the caller sees it, without the profiler. ours, ours_us: a version of the model in
    PyTorch, and how long its call takes.
    """

    file: str
    onnxruntime: str
    threads: int
    before: Mapping[str, int]
    after: Mapping[str, int]
    rows: tuple[OrtRow, ...]
    us: float
    ours: str | None = None
    ours_us: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        return plain(*self._parts(), width=100)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _parts(self) -> list[RenderableType]:
        from rich.text import Text

        beside = f"; {self.ours}: {human_us(self.ours_us)}" if self.ours and self.ours_us else ""
        where = f"ONNX Runtime {self.onnxruntime} on the CPU (threads: {self.threads})"
        nodes = [sum(counts.values()) for counts in (self.before, self.after)]
        graph = f"Its graph: {nodes[0]} nodes, after its own optimizations {nodes[1]}"
        times = "Where its time goes with its profiler on, by the Op that a node came from"
        return [
            Text(f"{where}: {human_us(self.us)} a call{beside}."),
            "",
            Text(graph, style="bold"),
            self._operators(),
            Text(times, style="bold"),
            self._times(),
        ]

    def _operators(self) -> Table:
        """Only what changes: what stays says nothing of its optimizations."""
        table = _table("gone", "new")
        changes = Counter(self.after)
        changes.subtract(self.before)
        gone = ", ".join(f"{-n} {name}" for name, n in sorted(changes.items(), key=lambda each: each[1]) if n < 0)
        new = ", ".join(f"{n} {name}" for name, n in changes.most_common() if n > 0)
        _add_row(table, gone or "nothing", new or "nothing")
        return table

    def _times(self) -> Table:
        ours = [">ours"] if self.ours is not None else []
        table = _table("Op", ">time", ">share", *ours, "nodes")
        total = sum(row.us for row in self.rows) or 1.0
        for row in self.rows:
            beside = [human_us(row.ours_us) if row.ours_us is not None else ""] if ours else []
            nodes = ", ".join(f"{count} {name}" for name, count in row.nodes.items())
            _add_row(table, row.op, human_us(row.us), f"{row.us / total:.0%}", *beside, nodes)
        return table


def explain_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int = 20,
    ours: Profile | None = None,
) -> OrtView:
    """What ONNX Runtime makes of `model` as `burnish.to_onnx` writes it, on these inputs, with as many threads as
    PyTorch has.

    ours: a profile of the model in PyTorch to stand beside it: `fast.report(args, kwargs).explanation.after`.

    Raises what `to_onnx` raises.
    """
    from burnish.onnx import to_onnx

    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(model, args, Path(folder, f"{type(model).__name__}.onnx"), kwargs, opset=opset)
        return view(file.path, tensors, ours)


def view(path: str | Path, inputs: Sequence[Tensor], ours: Profile | None = None) -> OrtView:
    """What ONNX Runtime makes of a file, run on the CPU on these inputs, in the file's order. OnnxError where it
    refuses them."""
    import onnx
    import onnxruntime

    from burnish.onnx.running import open_session, run

    path = Path(path)
    levels = onnxruntime.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        open_session(path, _options(levels.ORT_DISABLE_ALL, Path(folder, _BEFORE)))
        options = _options(levels.ORT_ENABLE_ALL, Path(folder, _AFTER))
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        session = open_session(path, options)
        for _ in range(_WARM_UP + _RUNS):
            run(session, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
        before, after = (onnx.load(Path(folder, name), load_external_data=False) for name in (_BEFORE, _AFTER))
    owners = _owners(onnx.load(path, load_external_data=False), after)
    unprofiled = open_session(path, _options(levels.ORT_ENABLE_ALL, None))
    return OrtView(
        path.name,
        onnxruntime.__version__,
        torch.get_num_threads(),
        _operators(before.graph),
        _operators(after.graph),
        _rows(events, owners, _ours(ours)),
        _time_us(lambda: run(unprofiled, inputs)),
        None if ours is None else ours.version,
        None if ours is None else ours.end_to_end_us,
    )


def _options(level: Any, saved: Path | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    if saved is not None:
        options.optimized_model_filepath = str(saved)
        for key, value in (("file_name", f"{saved.name}.data"), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    return options


def _operators(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph.node).most_common())


def _rows(
    events: Iterable[Mapping[str, Any]], owners: Mapping[str, str], ours: Mapping[str, float]
) -> tuple[OrtRow, ...]:
    """The profile's nodes by Op, those that take longest first; each node's time is the median of its runs."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_RAN):
            times[event["name"].removesuffix(_RAN), event["args"]["op_name"]].append(event["dur"])
    us: dict[str, float] = defaultdict(float)
    nodes: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, kernel), durations in times.items():
        op = owners.get(name, _OTHERS)
        us[op] += statistics.median(durations[_WARM_UP:] or durations)
        nodes[op][kernel] += 1
    rows = [OrtRow(op, dict(nodes[op].most_common()), us[op], ours.get(op)) for op in us]
    return tuple(sorted(rows, key=lambda row: -row.us))


def _owners(file: Any, after: Any) -> dict[str, str]:
    """The Op that each node of the graph that is run came from, by the node's name: of nodes fused over several Ops
    the one whose result they give."""
    results = {
        value: node.op_type for node in file.graph.node if node.domain == DOMAIN for value in node.output if value
    }
    functions = sorted({function.name for function in file.functions}, key=len, reverse=True)
    inlined = re.compile(f"{_INLINED}({'|'.join(map(re.escape, functions))})_")
    owners = {}
    for node in after.graph.node:
        found = next((match for name in (*node.output, node.name) if (match := inlined.match(name))), None)
        op = next((results[value] for value in node.output if value in results), found and found[1])
        if op is not None:
            owners[node.name] = op
    return owners


def _ours(profile: Profile | None) -> dict[str, float]:
    """Microseconds by Op, and those of everything else."""
    totals: dict[str, float] = defaultdict(float)
    for block, row in profile.rows if profile is not None else ():
        namespace, _, name = row.op.partition(".")
        totals[name if namespace == "burnish" else _OTHERS] += block.count * row.shown_us
    return dict(totals)


def _time_us(call: Any) -> float:
    durations = []
    for _ in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        call()
        durations.append(1e6 * (time.perf_counter() - started))
    return statistics.median(durations[_WARM_UP:])


def _table(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column[0] == ">" else "left", overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Cells as they are: what stands in brackets in a name is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))
