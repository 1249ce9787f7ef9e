"""The timeline of a block as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source of the format: "Trace Event Format", the JSON object form with complete events ("X") and metadata ("M").
"""

from __future__ import annotations

from typing import Any

from burnish.report import digest
from burnish.report.data import Explanation, Span
from burnish.report.timeline import lanes, timed_block, timed_rows

_PROCESS, _OPS = 1, 0  # kernels are on threads 1, 2, ...: one for each lane


def trace_events(explanation: Explanation) -> dict[str, Any]:
    """The kernels of `explanation.timeline`, and above them the ops that they ran for; times in microseconds.

    The result is ready for `json.dump`. Without a timeline it has metadata and no events.
    """
    found = timed_block(explanation)
    where = f", {found[0].version}: {digest.block_title(found[1])}" if found else ""
    tracks = lanes(explanation.timeline)
    names = {_OPS: "ops", **{number: f"kernels {number}" for number in range(1, len(tracks) + 1)}}
    events = [_name("process_name", 0, f"{explanation.model}{where}")]
    events += [_name("thread_name", thread, name) for thread, name in names.items()]
    events += _ops(explanation)
    for thread, spans in enumerate(tracks, start=1):
        events += [_complete(span.name, "kernel", thread, span.start_us, span.us, {"op": span.row}) for span in spans]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "model": explanation.model,
            "device": explanation.before.device,
            "inputs": list(explanation.inputs),
        },
    }


def _ops(explanation: Explanation) -> list[dict[str, Any]]:
    """An event for each op, from the start of its first kernel to the end of its last.

    Where ops take turns (two streams), an op is cut into the stretches that it has for itself: events of one thread
    must not overlap.
    """
    rows = timed_rows(explanation)
    stretches: list[list[Span]] = []
    for span in sorted(explanation.timeline, key=lambda span: span.start_us):
        if stretches and stretches[-1][-1].row == span.row:
            stretches[-1].append(span)
        else:
            stretches.append([span])
    events = []
    for place, spans in enumerate(stretches):
        start, end = spans[0].start_us, max(span.start_us + span.us for span in spans)
        if place + 1 < len(stretches):
            end = min(end, stretches[place + 1][0].start_us)
        row = rows.get(spans[0].row)
        about = {} if row is None else {"source": row.source, "module": row.module, "floor_us": row.floor_us}
        name = digest.op_name(row.op) if row else spans[0].row
        events.append(_complete(name, "op", _OPS, start, end - start, about))
    return events


def _name(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _complete(name: str, category: str, thread: int, start: float, us: float, args: dict[str, Any]) -> dict[str, Any]:
    times = {"ts": round(start, 3), "dur": round(us, 3)}
    return {"name": name, "cat": category, "ph": "X", "pid": _PROCESS, "tid": thread, **times, "args": args}
