"""The page's charts as plain geometry: positions are percentages of the plot, so that a chart fits any width."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from burnish._text import human_us
from burnish.report import digest
from burnish.report.data import Block, Explanation, OpRow, Profile, Span
from burnish.report.timeline import lanes, timed_block, timed_rows


@dataclass(frozen=True)
class Tick:
    """A line across the plot and what stands at its end."""

    at: float
    label: str


# --- roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """An op in the roofline. radius in pixels; tip: the lines of its tooltip; row: the id of its row in the table."""

    x: float
    y: float
    radius: float
    version: str
    tip: str
    row: str
    label: str = ""


@dataclass(frozen=True)
class Roof:
    """A ceiling, from (x1, y1) to (x2, y2)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str


@dataclass(frozen=True)
class Roofline:
    """FLOP/s that each op reached against FLOPs per byte, both logarithmic, under what the device can do.

    Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009. An op without
    arithmetic has no place there; it stands on the left edge, as far under the roof as its bandwidth is.
    left_out: how many ops take time and move no bytes.
    """

    points: tuple[Point, ...]
    roofs: tuple[Roof, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left_out: int


@dataclass(frozen=True)
class _Axis:
    low: float  # decimal logarithms
    high: float

    @classmethod
    def around(cls, values: Iterable[float]) -> _Axis:
        logs = [math.log10(value) for value in values]
        return cls(math.floor(min(logs) - 0.2), math.ceil(max(logs) + 0.1))

    def place(self, value: float) -> float:
        return 100 * (math.log10(value) - self.low) / (self.high - self.low)

    def decades(self) -> range:
        return range(math.ceil(self.low), int(self.high) + 1)


def roofline(explanation: Explanation, listed: Container[str], numbers: Mapping[str, int]) -> Roofline | None:
    """listed: ids of the rows that get a point. numbers: id -> what to write into it. None where there is no point, or
    the device's ceilings are not known."""
    profiles = [profile for profile in (explanation.before, explanation.after) if profile]
    known = explanation.before.bandwidth_gbs * 1e3  # bytes a microsecond
    rows = [(id_, block, row) for p in profiles for id_, block, row in identified(p, p is explanation.after)]
    timed = [each for each in rows if each[2].shown_us and each[0] in listed]
    placed = [each for each in timed if each[2].bytes]
    if not placed or not known:
        return None
    computed = {row.dtype for _, _, row in placed if row.flops}
    ceilings = {dtype: rate * 1e3 for dtype, rate in explanation.before.gflops.items() if dtype in computed}
    intensities = [row.flops / row.bytes for _, _, row in placed]
    x_axis = _Axis.around([*filter(None, intensities), *(rate / known for rate in ceilings.values())] or [1.0])
    left = 10**x_axis.low
    x_axis = replace(x_axis, low=x_axis.low - 0.12)  # points on the left edge are to stand clear of the axis
    xs = [intensity or left for intensity in intensities]
    ys = [x * row.bytes / row.shown_us for x, (_, _, row) in zip(xs, placed, strict=True)]
    y_axis = _Axis.around([*ys, *(ceilings.values() or [known * x for x in xs])])
    largest = max(row.shown_us * block.count for _, block, row in placed)
    points = []
    for (id_, block, row), x, y in zip(placed, xs, ys, strict=True):
        radius = 3.5 + 8.5 * math.sqrt(row.shown_us * block.count / largest)
        place, version = (x_axis.place(x), 100 - y_axis.place(y)), id_.partition("-")[0]
        points.append(Point(*place, radius, version, tip(block, row), id_, str(numbers.get(id_, ""))))
    # What is small or has a number is drawn over the rest.
    points.sort(key=lambda point: (bool(point.label), -point.radius))
    return Roofline(
        points=tuple(points),
        roofs=tuple(_roofs(x_axis, y_axis, known, ceilings)),
        x_ticks=tuple(Tick(x_axis.place(10.0**d), _decade(d)) for d in x_axis.decades()),
        y_ticks=tuple(Tick(100 - y_axis.place(10.0**d), _rate(10.0**d)) for d in y_axis.decades()),
        left_out=len(timed) - len(placed),
    )


def _roofs(x_axis: _Axis, y_axis: _Axis, known: float, ceilings: dict[str, float]) -> Iterable[Roof]:
    left, right = 10**x_axis.low, 10**x_axis.high
    bottom = 10**y_axis.low
    end = min(max((rate / known for rate in ceilings.values()), default=right), right, 10**y_axis.high / known)
    start = max(left, bottom / known)

    def roof(x1: float, y1: float, x2: float, y2: float, label: str) -> Roof:
        return Roof(x_axis.place(x1), 100 - y_axis.place(y1), x_axis.place(x2), 100 - y_axis.place(y2), label)

    yield roof(start, start * known, end, end * known, f"{_rate(known, 'B/s')} memory")
    for dtype, rate in ceilings.items():
        yield roof(rate / known, rate, right, rate, f"{_rate(rate)} {dtype}")


def _decade(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"


def _rate(per_us: float, unit: str = "FLOP/s") -> str:
    value = per_us * 1e6
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def identified(profile: Profile, after: bool) -> list[tuple[str, Block, OpRow]]:
    """Every row with its id on the page, "before-0" or "after-0"."""
    version = "after" if after else "before"
    return [(f"{version}-{number}", block, row) for number, (block, row) in enumerate(profile.rows)]


def tip(block: Block, row: OpRow) -> str:
    """What a tooltip says of an op: name, place, source, times."""
    share = digest.share_of_floor(row.floor_us, row.shown_us)
    floor = f", floor {human_us(row.floor_us)} ({share})" if row.floor_us else ""
    times = f" at each of {block.count} places" if block.count > 1 else ""
    said = "predicted " if row.us is None else ""
    lines = [
        f"{digest.op_name(row.op)}, {digest.row_name(block, row)}",
        row.source,
        f"{said}{human_us(row.shown_us)}{times}{floor}",
        f"bound by {row.bound}",
    ]
    return "\n".join(line for line in lines if line)


# --- timeline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A kernel in time. tint alternates from op to op."""

    x: float
    width: float
    lane: int
    tint: int
    label: str
    tip: str
    row: str


@dataclass(frozen=True)
class Timeline:
    """The kernels of one block. busy: the share of the time in which at least one runs. waits: for less than half."""

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    lanes: int
    us: float
    busy: str
    waits: bool


def timeline(explanation: Explanation, listed: Container[str]) -> Timeline | None:
    """listed: ids of the rows that a kernel may lead to. None where there is no timeline (a prediction)."""
    found = timed_block(explanation)
    if found is None:
        return None
    profile, block = found
    ids = {row.name: id_ for id_, b, row in identified(profile, profile is explanation.after) if b is block}
    ids = {name: id_ for name, id_ in ids.items() if id_ in listed}
    rows = timed_rows(explanation)
    whole = max(span.start_us + span.us for span in explanation.timeline) or 1.0
    tints = {row: place % 2 for place, row in enumerate(dict.fromkeys(span.row for span in explanation.timeline))}
    filled = lanes(explanation.timeline)
    bars = []
    for lane, spans in enumerate(filled):
        for span in spans:
            row = rows.get(span.row)
            label = digest.op_name(row.op) if row else digest.kernel_name(span.name)
            about = f"{label}\n{digest.kernel_name(span.name)}\n{human_us(span.us)}, from {human_us(span.start_us)}"
            place = 100 * span.start_us / whole, 100 * span.us / whole
            bars.append(Bar(*place, lane, tints[span.row], label[:40], about, ids.get(span.row, "")))
    bars.sort(key=lambda bar: bar.x)
    covered = _covered(explanation.timeline)
    title = f"{digest.block_title(block)}, {profile.version}"
    return Timeline(
        title,
        tuple(bars),
        tuple(_time_ticks(whole)),
        len(filled),
        whole,
        digest.percent(covered, whole),
        covered < whole / 2,
    )


def _covered(spans: Sequence[Span]) -> float:
    total, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start_us):
        end = span.start_us + span.us
        total += max(0.0, end - max(span.start_us, until))
        until = max(until, end)
    return total


def _time_ticks(whole: float) -> Iterable[Tick]:
    unit, us = ("ms", 1e3) if whole >= 1e4 else ("us", 1.0)
    step = 10.0 ** math.floor(math.log10(whole / us / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if whole / us / (step * factor) <= 7)
    last = int(whole / us / step)
    for number in range(last + 1):
        label = f"{number * step:,g}"
        yield Tick(100 * number * step * us / whole, f"{label} {unit}" if number == last else label)
