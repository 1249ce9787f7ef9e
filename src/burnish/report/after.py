"""What optimizing brought: the lowered graph measured op by op, beside the model as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from burnish.hardware import device
from burnish.lower import METHOD_OF, Slot
from burnish.prepare import Prepared
from burnish.report.as_called import attention_nodes
from burnish.report.data import Explanation
from burnish.report.explain import SDPA, explain, profile_of
from burnish.report.fusions import fusions_of
from burnish.report.measure import device_of, measure, refuse_caches
from burnish.report.opportunities import with_measured
from burnish.report.pieces import costliest_block, groups_of, nodes_of, picture, timeline_of
from burnish.report.predict import CostModel
from burnish.report.report import Report
from burnish.report.rows import Seen, folding_of, rows_of
from burnish.report.sizes import work_on_fakes
from burnish.runtime.module import Call, OptimizedModule
from burnish.schedule import Schedule, Served, check_call
from burnish.tuning import Tuner

_SECONDS = 2.0


def report_on(fast: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any], before: Report | None) -> Report:
    """The Report of `fast` with the profiles before and after, measured on these inputs; without them where the model
    cannot be captured.

    TypeError for a bad argument; the model's own error for inputs that do not fit.
    """
    schedule: Schedule = fast.schedule  # type: ignore[assignment]
    check_call(schedule.model, args, kwargs)
    if before is not None and (not isinstance(before, Report) or before.explanation is None):
        raise TypeError("before: the Report of burnish.explain on the same inputs is needed")
    refuse_caches(args, kwargs)
    with torch.no_grad():
        fast(*args, **kwargs)  # sets up what serves such calls
        call = fast._call(args, kwargs)
        prepared = schedule.prepared_for(call) if call is not None else None
        served = schedule.served_for(call) if call is not None else None
        if call is None or prepared is None or served is None:
            return schedule.report()
        known = before or explain(schedule.model, args, kwargs)
        assert known.explanation is not None
        run = functools.partial(fast, *args, **kwargs)
        return schedule.report(_with_after(known.explanation, schedule, prepared, served, call, run))


def _with_after(
    before: Explanation,
    schedule: Schedule,
    prepared: Prepared,
    served: Served,
    call: Call,
    run: Callable[[], Any],
) -> Explanation:
    where = device_of(schedule.model, call.leaves)
    graph_module = prepared.program.graph_module
    slots = {slot.origin: slot for slot in prepared.executable.slots}
    chosen = {slot.name: _Chosen(slot, prepared, schedule.tuner) for slot in prepared.executable.slots}
    functions: dict[fx.Node, Callable[..., Any]] = {}
    impls: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if (slot := slots.get(node.name)) is not None:
            functions[node] = chosen[slot.name]
            impls[node] = served.choices[slot.name].candidate
        elif node.target in METHOD_OF:
            functions[node] = METHOD_OF[node.target]
    version, notes = "optimized", list(before.notes)
    if served.kept_original is not None:
        version, run = "optimized, not in use", functools.partial(prepared.bind(chosen, schedule.model), call)
        notes.append(f"The original serves these calls: {served.kept_original}.")
    seen, times = measure(graph_module, functions, call.leaves, run, where=where, seconds=_SECONDS)
    if served.cuda_graph:  # in which no kernel waits for the host, as it did while it was measured
        seen.launches = {node: [replace(each, idle_us=0.0) for each in ran] for node, ran in seen.launches.items()}
    seen.impls = impls
    here = device(where)
    costs = CostModel.of(here, cuda=where.type == "cuda").fitted((seen.work[n], seen.us[n]) for n in seen.nodes)
    attention = dict.fromkeys(attention_nodes(prepared.captured.graph), SDPA)
    captured = Seen(prepared.captured, work_on_fakes(prepared.captured, call.leaves), names=attention)
    folding = folding_of(captured)
    names, rows = rows_of(captured, folding, costs), rows_of(seen, folding, costs)
    fusions = fusions_of(graph_module.graph, prepared.captured.graph)
    shown = costliest_block(rows.blocks)
    pictures, timeline = before.pictures, before.timeline
    if shown is not None:
        groups, nodes = groups_of(fusions, captured), nodes_of(seen, folding, shown)
        title = shown.path or shown.kind
        pictures = (
            picture(f"{title}, as it was", nodes_of(captured, folding, shown), captured, groups),
            picture(f"{title}, optimized", nodes, seen, groups),
        )
        timeline = timeline_of(seen, rows, nodes)
    return replace(
        before,
        after=profile_of(version, here.label, seen, rows, costs, times),
        opportunities=with_measured(before.opportunities, fusions, captured, names, seen),
        pictures=pictures,
        timeline=timeline,
        code=prepared.executable.source.strip(),
        notes=tuple(notes),
    )


class _Chosen:
    """What runs in a slot; looked up at the first call, for its arguments."""

    def __init__(self, slot: Slot, prepared: Prepared, tuner: Tuner) -> None:
        self._slot, self._tuner = slot, tuner
        self._function = slot.op.reference if slot.name in prepared.rejected else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self._slot.op.bind(*args, **kwargs)
        if self._function is None:
            in_place = self._slot.in_place
            self._function, _ = self._tuner.choose(self._slot.op, args, budget_us=0, in_place=in_place)
        return self._function(*args)
