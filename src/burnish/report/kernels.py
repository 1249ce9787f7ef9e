"""Which kernels run for each node: on CUDA by torch's profiler, on the CPU the operators under each call.

On CUDA each node runs inside a named range. The profiler's trace links a kernel to the host's call that launched it (by
its correlation id), and that call lies in a range. Source of the format: "Trace Event Format", as Kineto writes it.
"""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.report.costs import computes_nothing
from burnish.report.data import Kernel
from burnish.report.timing import fastest
from burnish.report.walk import Visit, Walk

_RANGE = "burnish node"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cuda_runtime", "cuda_driver")
_ROUNDS = 3


@dataclass(frozen=True)
class Launch:
    """A kernel as it ran once, or on the CPU an operator.

    us: what it adds to the call: from its start, or from the end of the one before it where that is later, to its end.
    beside_us: how long it ran beside those before it.
    """

    name: str
    start_us: float
    us: float
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    beside_us: float = 0.0


Launches = dict[fx.Node, list[Launch]]
Event = Mapping[str, Any]


def merged(launches: Sequence[Launch], us: float, repeats: int) -> tuple[Kernel, ...]:
    """Equal ones together, in the order of their first, for one of so many repeats; their times add up to `us`."""
    total = sum(launch.us for launch in launches) or 1.0
    groups: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.name, launch.grid, launch.block), []).append(launch)
    return tuple(
        Kernel(name, len(group) / repeats, us * sum(each.us for each in group) / total, grid, block)
        for (name, grid, block), group in groups.items()
    )


# --- on the CPU -------------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Times every operator that reaches a backend and computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        us = (time.perf_counter() - started) * 1e6
        if not computes_nothing(func):
            self.launches.append(Launch(str(func).removesuffix(".default"), started * 1e6, us))
        return result


def operators(walk: Walk, leaves: Sequence[Any]) -> Launches:
    """The operators under each node, in one walk; views are none of them."""
    found: Launches = {}

    def visit(node: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with _Operators() as noted:
            result = function(*args, **kwargs)
        found[node] = noted.launches
        return result

    walk(leaves, visit)
    return found


# --- on CUDA ----------------------------------------------------------------------------------------------------------


def kernels(walk: Walk, leaves: Sequence[Any]) -> tuple[Launches, dict[fx.Node, float]]:
    """The kernels of each node in one of the quickest walks, and each node's time on the device, a mean over these."""
    nodes = list(walk.graph_module.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}

    def visiting(number: int) -> Visit:
        def visit(node: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with record_function(f"{_RANGE} {number}:{place[node]}"):
                return function(*args, **kwargs)

        return visit

    def walks() -> None:
        for number in range(_ROUNDS):
            walk(leaves, visiting(number))
            torch.cuda.synchronize()

    rounds: list[Launches] = [{} for _ in range(_ROUNDS)]
    for name, launches in launches_by_range(traced(walks)).items():
        number_text, _, place_text = name.removeprefix(_RANGE).partition(":")
        rounds[int(number_text)][nodes[int(place_text)]] = launches
    quick = fastest(rounds, lambda each: sum(map(added_us, each.values())))
    return quick[0], mean_us(quick)


def traced(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of PyTorch's profiler while `run` runs on CUDA, in the "Trace Event Format"."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def mean_us(rounds: Sequence[Launches]) -> dict[fx.Node, float]:
    """What each node's kernels add, the mean over some rounds."""
    return {node: sum(added_us(each.get(node, ())) for each in rounds) / len(rounds) for node in rounds[0]}


def added_us(launches: Iterable[Launch]) -> float:
    """What the kernels add to the call, all together."""
    return sum(launch.us for launch in launches)


def launches_by_range(events: Iterable[Event]) -> dict[str, list[Launch]]:
    """The kernels, copies and fills of a trace by the innermost of our ranges in which the host launched them."""
    complete = [event for event in events if event.get("ph") == "X"]
    ranges: dict[Any, list[tuple[float, float, str]]] = {}
    for event in complete:
        if event.get("cat") == "user_annotation" and event["name"].startswith(_RANGE):
            ranges.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], event["name"]))
    for each in ranges.values():
        each.sort()
    launched: dict[int, str] = {}
    for event in host_calls(complete):
        name = _enclosing(ranges.get(event["tid"], []), event["ts"])
        if name is not None:
            launched[event["args"]["correlation"]] = name
    found: dict[str, list[Launch]] = {}
    for correlation, launch in on_device(complete):
        if (name := launched.get(correlation)) is not None:
            found.setdefault(name, []).append(launch)
    return found


def host_calls(events: Iterable[Event]) -> list[Event]:
    """The calls of CUDA that may have launched something, each with a correlation id."""
    return [e for e in events if e.get("cat") in _ON_HOST and "correlation" in e.get("args", {})]


def on_device(events: Iterable[Event]) -> Iterator[tuple[int, Launch]]:
    """What ran on the device, in the order in which it began there, with the correlation id of what launched it.

    Kernels overlap where a launch lets the next one begin early, or on several streams: no moment counts twice.
    """
    busy_until: float | None = None
    for event in sorted((e for e in events if e.get("cat") in _ON_DEVICE), key=lambda e: e["ts"]):
        start, end, args = event["ts"], event["ts"] + event["dur"], event.get("args", {})
        free = start if busy_until is None else busy_until
        added = max(0.0, end - max(start, free))
        grid, block = tuple(args.get("grid", ())), tuple(args.get("block", ()))
        busy_until = max(free, end)
        yield args.get("correlation", -1), Launch(event["name"], start, added, grid, block, end - start - added)


def _enclosing(ranges: Sequence[tuple[float, float, str]], moment: float) -> str | None:
    """The range that `moment` lies in; ours do not overlap."""
    at = bisect.bisect_right(ranges, (moment, float("inf"), "")) - 1
    return ranges[at][2] if at >= 0 and moment <= ranges[at][1] else None
