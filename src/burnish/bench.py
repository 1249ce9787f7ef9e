"""Timing several ways to compute the same thing, fairly: paired, interleaved in rounds, warmed, median and spread."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from burnish._files import write_text
from burnish._text import human_us, plain
from burnish.hardware import DeviceInfo, device

if TYPE_CHECKING:
    from rich.table import Table

RECORD_KEYS = (
    *("case", "variant", "median_us", "p20_us", "p80_us", "kernels", "floor_us"),
    *("device", "versions", "date", "command"),
)

# A variant's worker threads (OpenMP's, ONNX Runtime's) spin for some milliseconds after its last call and take the
# cores from whoever comes next: MiniLM eager, next to ONNX Runtime, measured 21 ms when the calls alternated and 9.8 ms
# in blocks with a pause of 50 ms before each.
_PAUSE_SECONDS = 0.05
_WARMUP_SECONDS = 0.02
_MIN_CALLS = 3
_UNSTEADY = 1.25


@dataclass(frozen=True)
class Within:
    """A variant whose calls happen inside a context manager, which is entered once for each block and costs them
    nothing: `Within(f, lambda: sdpa_kernel(SDPBackend.MATH))`, whose entering takes 14 us."""

    function: Callable[..., object]
    context: Callable[[], AbstractContextManager[object]]

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self.function(*args, **kwargs)


def unsteady(calls: str, usual_us: float, quick_us: float) -> str | None:
    """What to say beside the times of some calls, where half of them took so much longer than the quick ones that
    something else must have used the machine; None where they did not."""
    if usual_us <= _UNSTEADY * quick_us:
        return None
    usual, quick = human_us(usual_us), human_us(quick_us)
    return f"Half of the calls ({calls}) took {usual} and more, the quickest {quick}: the machine was busy."


class BenchmarkError(RuntimeError):
    """A variant failed while it was timed; the message names it, the cause is chained."""


@dataclass(frozen=True)
class Timing:
    """One variant's calls: each call's time in microseconds, one tuple per round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> int:
        return sum(len(block) for block in self.rounds)

    @property
    def median_us(self) -> float:
        return statistics.median(self._sorted())

    @property
    def p20_us(self) -> float:
        """A fifth of the calls were at least this fast."""
        return _percentile(self._sorted(), 0.2)

    @property
    def p80_us(self) -> float:
        """Four fifths of the calls were at least this fast."""
        return _percentile(self._sorted(), 0.8)

    def _sorted(self) -> list[float]:
        return sorted(call for block in self.rounds for call in block)


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured. Prints as a table; `timings` by variant, in the order in which they were given."""

    timings: Mapping[str, Timing]
    device: DeviceInfo
    date: str

    @property
    def speedups(self) -> dict[str, float]:
        """How many times as fast as the first variant each one is: the median over rounds of the rounds' ratios.

        Each ratio pairs two blocks of one round, milliseconds apart, so that a machine that slows down or speeds up
        during the measurement moves both sides alike.
        """
        first = next(iter(self.timings.values()))
        return {
            name: statistics.median(
                statistics.median(base) / statistics.median(block)
                for base, block in zip(first.rounds, timing.rounds, strict=True)
            )
            for name, timing in self.timings.items()
        }

    def records(
        self,
        case: str,
        command: str,
        *,
        kernels: Mapping[str, int] | None = None,
        floor_us: float | None = None,
    ) -> list[dict[str, Any]]:
        """One JSON-ready dict per variant, with the keys `RECORD_KEYS`.

        case: what was computed, such as "minilm fp32 b1 s128". command: how to measure it again. kernels: launches per
        call by variant, where known. floor_us: the least time the device could need, where known.
        """
        return [
            {
                "case": case,
                "variant": name,
                "median_us": round(timing.median_us, 3),
                "p20_us": round(timing.p20_us, 3),
                "p80_us": round(timing.p80_us, 3),
                "kernels": (kernels or {}).get(name),
                "floor_us": None if floor_us is None else round(floor_us, 3),
                "device": self.device.label,
                "versions": dict(self.device.versions),
                "date": self.date,
                "command": command,
            }
            for name, timing in self.timings.items()
        ]

    def to_json(self, path: str | Path, case: str, command: str = "") -> None:
        """Write the records to `path`; records of other cases that the file holds already stay."""
        save_records(Path(path), self.records(case, command))

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        first = next(iter(self.timings))
        table = Table("variant", title=self.device.label, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("median", "p20", "p80", "calls", f"times as fast as {first}"):
            table.add_column(heading, justify="right")
        speedups = self.speedups
        for name, timing in self.timings.items():
            times = (human_us(value) for value in (timing.median_us, timing.p20_us, timing.p80_us))
            table.add_row(name, *times, str(timing.calls), f"{speedups[name]:.2f}x")
        return table

    def __str__(self) -> str:
        return plain(self)


def benchmark(
    variants: Mapping[str, Callable[..., object]],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float = 1.0,
    rounds: int = 5,
    cold_l2: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Benchmark:
    """Time every variant as `variant(*args, **kwargs)` and compare each with the first.

    The variants take turns: each of the `rounds` gives every variant one block (a pause in which the previous variant's
    threads fall asleep, warm-up calls, then timed calls), and every second round goes backwards. `seconds` is the timed
    time per variant over all rounds; a block makes at least three timed calls, however long they take. Everything
    before a block (compiling, capturing) happens in its warm-up and is not counted.

    Grad mode, autocast and the number of threads are the caller's: what holds around `benchmark` holds in the calls. A
    variant may be a `Within`, to be called inside a context of its own.
    On CUDA (where an argument or a result is a CUDA tensor) calls are timed with events; `cold_l2` fills the L2
    cache with other data before each call, as the layers around it would in a model; this also hides the host's time to
    launch.
    `on_progress(variant, block, blocks)` is called before each block, `block` counting from 1.

    Raises ValueError or TypeError for arguments that cannot work, BenchmarkError naming the variant that raised.
    """
    _validate(variants, seconds, rounds)
    kwargs = dict(kwargs or {})
    calls = {name: _bind(name, function, args, kwargs) for name, function in variants.items()}
    results = []
    for name, call in calls.items():  # the first call of each may compile or capture: before any block
        with _context_of(variants[name]):
            results.append(call())
    target = _device_of([*args, *kwargs.values(), *results])
    del results
    if cold_l2 and target.type != "cuda":
        raise ValueError("cold_l2=True needs CUDA tensors; on the CPU leave it out")
    time_block = _cuda_timer(target, cold_l2) if target.type == "cuda" else _time_cpu_block

    blocks: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for place, name in enumerate(order):
            if on_progress is not None:
                on_progress(name, turn * len(order) + place + 1, rounds * len(order))
            time.sleep(_PAUSE_SECONDS)
            with _context_of(variants[name]):
                blocks[name].append(time_block(calls[name], seconds / rounds))
    return Benchmark(
        timings={name: Timing(tuple(taken)) for name, taken in blocks.items()},
        device=device(target, measure=False),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def load_records(path: Path) -> list[dict[str, Any]]:
    """The records of one result file, checked; [] where there is no such file, ValueError for one that is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it, and the next run writes it anew") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__} where a list of records was expected")
    for number, record in enumerate(records):
        missing = [key for key in RECORD_KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(f"{path}: record {number} lacks {', '.join(missing)}")
    return records


def save_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put records into the JSON list in `path`. A case's older records all go: its ratios must come from one run."""
    measured = {record["case"] for record in records}
    kept = [record for record in load_records(path) if record["case"] not in measured]
    write_text(path, json.dumps([*kept, *map(dict, records)], indent=1) + "\n")


def _validate(variants: Mapping[str, Callable[..., object]], seconds: float, rounds: int) -> None:
    if not variants:
        raise ValueError("variants is empty; give at least one, such as {'eager': model}")
    for name, function in variants.items():
        if not callable(function):
            raise TypeError(f"variants[{name!r}] is a {type(function).__name__}, which cannot be called")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds} must be a positive number of seconds per variant")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")


def _bind(
    name: str, function: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[], object]:
    def call() -> object:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise BenchmarkError(f"variant {name!r} raised {type(error).__name__}: {error}") from error

    return call


def _context_of(function: Callable[..., object]) -> AbstractContextManager[object]:
    return function.context() if isinstance(function, Within) else nullcontext()


def _device_of(values: Sequence[Any]) -> torch.device:
    """CUDA where any tensor is there; containers and registered output classes are looked into."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            return leaf.device
    return torch.device("cpu")


def _warm_up(call: Callable[[], object]) -> None:
    """At least two calls: caches, branch predictors and worker threads are this variant's again."""
    end = time.perf_counter() + _WARMUP_SECONDS
    call()
    call()
    while time.perf_counter() < end:
        call()


def _time_cpu_block(call: Callable[[], object], seconds: float) -> tuple[float, ...]:
    _warm_up(call)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_CALLS or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return tuple(times)


def _cuda_timer(target: torch.device, cold_l2: bool) -> Callable[[Callable[[], object], float], tuple[float, ...]]:
    """A block timer for one GPU. Each call starts on an idle GPU, so host time counts, unless the L2 flush hides it."""
    flush = None
    if cold_l2:
        # Several times the cache, so that the device is busy with it until the host has launched the call. It is read:
        # had it been written, the call would pay for the cache's writing it back.
        size = 8 * torch.cuda.get_device_properties(target).L2_cache_size
        flush = torch.zeros(size // 4, dtype=torch.float32, device=target)

    def time_block(call: Callable[[], object], seconds: float) -> tuple[float, ...]:
        times: list[float] = []

        def waited_for() -> None:  # else calls of 5 ms queue up for seconds
            call()
            torch.cuda.synchronize()

        with torch.cuda.device(target):
            _warm_up(waited_for)
            end = time.perf_counter() + seconds
            while len(times) < _MIN_CALLS or time.perf_counter() < end:
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                if flush is not None:
                    flush.sum()
                began.record()
                call()
                ended.record()
                ended.synchronize()
                times.append(began.elapsed_time(ended) * 1e3)
        return tuple(times)

    return time_block


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the ordered values."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
