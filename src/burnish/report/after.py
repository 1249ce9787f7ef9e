"""What optimizing brought: the lowered graph measured op by op, beside the model as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from burnish._text import human_us
from burnish.hardware import device
from burnish.lower import METHOD_OF, Slot, op_of
from burnish.prepare import Prepared
from burnish.report.as_called import attention_nodes
from burnish.report.data import NOT_IN_USE, Explanation, Profile
from burnish.report.digest import block_name
from burnish.report.explain import SDPA, explain, notes_on, profile_of
from burnish.report.fusions import Fusion, fusions_of
from burnish.report.measure import device_of, measure, refuse_caches
from burnish.report.opportunities import with_captured, with_measured
from burnish.report.pieces import costliest_block, groups_of, nodes_of, picture, timeline_of
from burnish.report.predict import CostModel
from burnish.report.report import Report
from burnish.report.rows import Rows, Seen, folding_of, rows_of
from burnish.report.sizes import work_on_fakes
from burnish.report.timing import in_turns
from burnish.runtime.module import Call, OptimizedModule
from burnish.served import Served
from burnish.serving import Serving
from burnish.settings import check_call
from burnish.tuning import Tuner

_SECONDS = 2.0
_DRIFT = 1.25  # so much longer or shorter than it took at first, the original takes now
_MUCH = 0.1  # of a block's time: so much of another's work in it is told


def report_on(fast: OptimizedModule, args: tuple[Any, ...], kwargs: dict[str, Any], before: Report | None) -> Report:
    """The Report of `fast` with the profiles before and after, measured on these inputs; without them where the model
    cannot be captured.

    TypeError for a bad argument; the model's own error for inputs that do not fit.
    """
    serving: Serving = fast.serving  # type: ignore[assignment]
    check_call(serving.model, args, kwargs)
    if before is not None and (not isinstance(before, Report) or before.explanation is None):
        raise TypeError("before: the Report of burnish.explain on the same inputs is needed")
    refuse_caches(args, kwargs)
    with torch.no_grad():
        fast(*args, **kwargs)  # sets up what serves such calls
        call = fast._call(args, kwargs)
        prepared = serving.prepared_for(call) if call is not None else None
        served = serving.served_for(call) if call is not None else None
        if call is None or prepared is None or served is None:
            return serving.report()
        known = before or explain(serving.model, args, kwargs, rewrites=serving.settings.rewrites)
        assert known.explanation is not None
        run = functools.partial(fast, *args, **kwargs)
        return serving.report(_with_after(known.explanation, serving, prepared, served, call, run))


def _with_after(
    before: Explanation,
    serving: Serving,
    prepared: Prepared,
    served: Served,
    call: Call,
    run: Callable[[], Any],
) -> Explanation:
    where = device_of(serving.model, call.leaves)
    graph_module = prepared.program.graph_module
    slots = {slot.origin: slot for slot in prepared.executable.slots}
    chosen = {slot.name: _Chosen(slot, prepared, serving.tuner) for slot in prepared.executable.slots}
    functions: dict[fx.Node, Callable[..., Any]] = {}
    impls: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        if (slot := slots.get(node.name)) is not None:
            functions[node] = chosen[slot.name]
            impls[node] = served.choices[slot.name].candidate
        elif node.target in METHOD_OF:
            functions[node] = METHOD_OF[node.target]
    version, why_not = "optimized", _why_no_graph(serving, served)
    if served.kept_original is not None:
        version, run = NOT_IN_USE, functools.partial(prepared.bind(chosen, serving.model), call)
    seen, times, notes = measure(
        graph_module, functions, call.leaves, run, where=where, seconds=_SECONDS, cuda_graph=not why_not
    )
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
    profile = profile_of(version, here.label, seen, rows, costs, times)
    if served.kept_original is not None:
        notes = (f"The original serves these calls: {served.kept_original}.", *notes)
    original = functools.partial(serving.model, *call.args, **call.kwargs)
    in_turns_us = in_turns((original, run), cuda=where.type == "cuda", seconds=_SECONDS / 4)
    notes = (*notes, *notes_on(profile, times, serving.model), *_drifted(before.before.end_to_end_us, *in_turns_us))
    notes = (*notes, *_moved(before.before, profile, fusions, names, rows))
    opportunities = with_measured(before.opportunities, fusions, captured, names, seen)
    return replace(
        before,
        after=profile,
        opportunities=with_captured(opportunities, profile, why_not),
        pictures=pictures,
        timeline=timeline,
        code=prepared.executable.source.strip(),
        notes=tuple(dict.fromkeys((*before.notes, *notes))),
    )


def _drifted(before_us: float, original_us: float, optimized_us: float) -> list[str]:
    """That the machine is not as it was when the original was measured: both in turns, as they are now."""
    if 1 / _DRIFT < original_us / before_us < _DRIFT:
        return []
    state = "busier" if original_us > before_us else "less busy"
    both = f"{human_us(original_us)} and {human_us(optimized_us)}, {original_us / optimized_us:.2f}x"
    return [f"The machine is {state} than when the original was measured: in turns, the two take {both}."]


def _moved(before: Profile, after: Profile, fusions: Iterable[Fusion], old: Rows, new: Rows) -> list[str]:
    """Of blocks that take longer now, whose work they do besides their own: an op counts where its result is."""
    was = {block.path: block for block in before.blocks}
    slower = {b.path for b in after.blocks if b.path in was and b.us * b.count > was[b.path].us * was[b.path].count}
    us = {(block.path, row.name): row.shown_us for block in before.blocks for row in block.rows}
    row_of = {node.name: row for node, row in old.row_of.items()}
    moved: dict[str, dict[str, float]] = {}
    for fusion in fusions:
        homes = {new.row_of[node][0] for node in fusion.made if node in new.row_of and op_of(node.target)}
        taken = [row_of[name] for name in fusion.taken if row_of.get(name) in us]
        for home in homes & slower:
            for row in taken:
                if row[0] != home:
                    sources = moved.setdefault(home, {})
                    sources[row[0]] = sources.get(row[0], 0.0) + us[row]
    return [
        f"{block_name(was[home])} does some of the work of {' and '.join(block_name(was[path]) for path in sources)} "
        "now: a fused op counts where its result is."
        for home, sources in moved.items()
        if sum(sources.values()) > _MUCH * was[home].us * was[home].count
    ]


def _why_no_graph(serving: Serving, served: Served) -> str:
    """Why no CUDA graph serves these calls; empty where one does."""
    if served.kept_original is not None:
        return f"the original serves these calls: {served.kept_original}"
    if served.cuda_graph:
        return ""
    never = serving.settings.cuda_graphs == "never"
    return served.not_captured or ("cuda_graphs is 'never'" if never else "the model is in training mode")


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
