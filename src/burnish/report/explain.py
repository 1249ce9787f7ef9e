"""`explain`: where a model's time goes and what could be fused, before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burnish._unchanged import nothing_changed
from burnish.bench import unsteady
from burnish.capture import Program, capture
from burnish.graph.show import describe_value
from burnish.hardware import device
from burnish.lower import Executable
from burnish.parallel.agreement import Agreement
from burnish.report.as_called import AttentionCalls, attention_nodes
from burnish.report.data import Explanation, GraphPicture, Opportunity, Profile, Span
from burnish.report.fold import Folding
from burnish.report.fusions import Rewritten, rewritten
from burnish.report.measure import device_of, flat, measure, refuse_caches
from burnish.report.opportunities import capturing, opportunities_of, ranked
from burnish.report.pieces import costliest_block, groups_of, nodes_of, picture, timeline_of
from burnish.report.predict import CostModel
from burnish.report.report import Report
from burnish.report.rows import Rows, Seen, folding_of, rows_of
from burnish.report.sizes import work_in_calls
from burnish.report.timing import Times
from burnish.rewrites import Rewrite, check_rewrites
from burnish.runtime.cuda_graph import why_not_captured
from burnish.runtime.module import OptimizedModule
from burnish.settings import check_call
from burnish.verify import random_node

Progress = Callable[[str], None]
SDPA = "aten.scaled_dot_product_attention"
_SECONDS = 2.0


def explain(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | None = None,
    rewrites: Sequence[Rewrite] = (),
    seconds: float = _SECONDS,
    on_progress: Progress = lambda doing: None,
) -> Report:
    """Where the time of `model(*args, **kwargs)` goes, op by op, how far that is from what the device allows, and what
    the default rewrites, and yours, would save. The model stays as it is, and is run a few dozen times.

    Args:
        args, kwargs: the inputs; times are of these sizes.
        target: a GPU that need not be here ("h200", see `burnish.targets`): nothing is run, all times are predicted
            from the ops' costs, and the model may be on the meta device.
        rewrites: your own, as `burnish.optimize` takes them.
        seconds: how long the model is timed, in all.
        on_progress: is told what is being done.

    Raises:
        TypeError, ValueError: a bad argument; the model's own error for inputs that do not fit.
        CaptureError: the model cannot be captured as one graph; the message names the place and the reason.
    """
    check_call(model, args, kwargs)
    if isinstance(model, OptimizedModule):
        raise TypeError("model: this one is optimized already; its report(args, kwargs) tells what that brought")
    check_rewrites(rewrites)
    agreement = Agreement()
    agreement.join_model(model)
    if agreement.is_shared and target is None:
        raise ValueError("model: it is divided among ranks, which do not time their parts in step; give target=")
    kwargs = dict(kwargs or {})
    with torch.no_grad(), nothing_changed(model):
        if target is not None:
            from burnish.report.imagine import imagine

            return Report(explanation=imagine(model, args, kwargs, target, rewrites, on_progress))
        return Report(explanation=_measured(model, args, kwargs, rewrites, seconds, on_progress))


def _measured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewrites: Sequence[Rewrite],
    seconds: float,
    on_progress: Progress,
) -> Explanation:
    refuse_caches(args, kwargs)
    leaves = flat(args, kwargs)
    where = device_of(model, leaves)
    on_progress("capturing the graph")
    program, functions = captured_as_called(model, args, kwargs)
    on_progress("measuring the model and each of its ops")
    call = functools.partial(model, *args, **kwargs)
    seen, times, notes = measure(program.captured, functions, leaves, call, where=where, seconds=seconds)
    seen.names = dict.fromkeys(functions, SDPA)
    on_progress("measuring what this device can do")
    here = device(where)
    costs = CostModel.of(here, cuda=where.type == "cuda").fitted((seen.work[n], seen.us[n]) for n in seen.nodes)
    on_progress("looking for what can be fused")
    done = rewritten(program.captured, rewrites)
    made = Seen(done.graph_module, work_in_calls(done.graph_module, leaves))
    story = Story(program, seen, done, made, costs)
    profile = profile_of("as it was", here.label, seen, story.rows, costs, times)
    return story.explanation(model, leaves, profile, notes=(*notes, *notes_on(profile, times, model)))


def captured_as_called(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Program, dict[Any, Callable[..., Any]]]:
    """The model's Program, and what to call instead of the nodes that capture put in place of attention.

    Where the model does not call torch's attention function at each of these, its own operators are captured.
    """
    with AttentionCalls() as noted:
        model(*args, **kwargs)
    program = capture(model, args, kwargs, attention_interface=bool(noted.calls))
    nodes = attention_nodes(program.captured.graph)
    if len(nodes) != len(noted.calls) and program.attention_interface:
        program = capture(model, args, kwargs, attention_interface=False)
        nodes = attention_nodes(program.captured.graph)
    return program, dict(zip(nodes, noted.calls, strict=True)) if len(nodes) == len(noted.calls) else {}


class Story:
    """A captured graph that was timed or predicted, and the same graph rewritten: what an Explanation is made of.

    Attributes:
        folding, rows: the blocks of the captured graph.
    """

    def __init__(self, program: Program, before: Seen, rewrites: Rewritten, made: Seen, costs: CostModel) -> None:
        self.program, self.before, self.rewrites, self.made, self.costs = program, before, rewrites, made, costs
        self.folding: Folding = folding_of(before)
        self.rows: Rows = rows_of(before, self.folding, costs)

    def explanation(
        self,
        model: nn.Module,
        leaves: list[Any],
        before: Profile,
        after: Profile | None = None,
        notes: tuple[str, ...] = (),
    ) -> Explanation:
        """Everything together, with pictures, timeline and code of the costliest block."""
        shown = costliest_block(before.blocks)
        pictures: list[GraphPicture] = []
        timeline: tuple[Span, ...] = ()
        if shown is not None:
            groups = groups_of(self.rewrites.fusions, self.before)
            nodes = nodes_of(self.before, self.folding, shown)
            title = shown.path or shown.kind
            pictures = [
                picture(f"{title}, as it was", nodes, self.before, groups),
                picture(f"{title}, fused", nodes_of(self.made, self.folding, shown), self.made, groups),
            ]
            timeline = timeline_of(self.before, self.rows, nodes)
        return Explanation(
            model=type(model).__name__,
            inputs=described(self.program, leaves),
            before=before,
            after=after,
            opportunities=ranked((*self._capturing(before, leaves), *self._fusing())),
            pictures=tuple(pictures),
            timeline=timeline,
            code=Executable(self.rewrites.graph_module, model).source.strip(),
            notes=notes,
            dtype=weights_dtype(model),
            torch=torch.__version__,
            rewrites=self.rewrites.own,
        )

    def _fusing(self) -> tuple[Opportunity, ...]:
        return opportunities_of(self.rewrites, self.made, self.before, self.rows, self.costs)

    def _capturing(self, profile: Profile, leaves: list[Any]) -> list[Opportunity]:
        if not self.costs.cuda:
            return []
        random = random_node(self.program.captured.graph)
        why_not = f"{random} is random" if random else why_not_captured(leaves) or ""
        return capturing(profile, self.before, self.rewrites.fusions, self.costs, why_not)


def profile_of(
    version: str, where: str, seen: Seen, rows: Rows, costs: CostModel, times: Times | None = None
) -> Profile:
    """A Profile of these rows; predicted where no call was timed."""
    ops_us = sum(block.us * block.count for block in rows.blocks)
    products = {work.dtype for work in seen.work.values() if work.kind not in ("pass", "free")}
    return Profile(
        version,
        where,
        predicted=times is None,
        blocks=rows.blocks,
        end_to_end_us=ops_us + costs.call_us if times is None else times.end_to_end_us,
        bandwidth_gbs=costs.bandwidth_gbs,
        gflops={str(dtype).removeprefix("torch."): costs.gflops(dtype) for dtype in sorted(products, key=str)},
        calls=0 if times is None else times.calls,
        cuda=costs.cuda,
    )


def notes_on(profile: Profile, times: Times, model: nn.Module) -> tuple[str, ...]:
    """What a reader has to know to read the times right."""
    notes = []
    if busy := unsteady(profile.version, times.median_us, times.end_to_end_us):
        notes.append(busy)
    timed = [row for _, row in profile.rows if row.us is not None and row.bytes]
    quickest = {row.bound for row in timed if row.floor_us == row.us}
    if quickest - {"compute"}:
        notes.append(
            "An op that is faster than its bytes could come from memory had them in a cache: it is at its floor."
        )
    if "compute" in quickest:
        notes.append(
            "A product was faster than the matrix rate that was measured: the device was busy then, so that floors are "
            "too high. `burnish device --refresh` measures again."
        )
    if model.training:
        notes.append("The model is in training mode: dropout is active. Call model.eval() to explain inference.")
    return tuple(notes)


def weights_dtype(model: nn.Module) -> str:
    """ "bfloat16" of the weights that are floats, or "bfloat16 and float32"; empty without any."""
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.is_floating_point()}
    return " and ".join(sorted(dtypes))


def described(program: Program, leaves: list[Any]) -> tuple[str, ...]:
    """ "input_ids int64[1, 128]" for each tensor."""
    pairs = zip(program.inputs, leaves, strict=True)
    return tuple(f"{spec.name} {describe_value(leaf)}" for spec, leaf in pairs if isinstance(leaf, Tensor))


__all__ = ["SDPA", "Story", "captured_as_called", "explain", "profile_of"]
