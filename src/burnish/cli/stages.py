"""A Program taken as far as the user wants to see it, and what of its graph to colour."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx, nn

import burnish
from burnish._text import human_bytes
from burnish.capture import CaptureError, Program, capture
from burnish.graph.matcher import Match, Pattern
from burnish.lower import Executable, op_of
from burnish.models import Loaded, ModelError, free_memory
from burnish.op import OPS, Op
from burnish.pack import pack
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply

STAGES = ("capture", "raise", "fuse", "pack", "lower")


def program_at(loaded: Loaded, stage: str) -> Program:
    """The Program after `stage`. CaptureError where the model cannot be captured.

    Which weights are also stored (K, N) is measured when optimizing; it changes no node, and is left out here. To lower
    is to optimize: Impls are measured, and what a check rejects is undone.
    """
    if stage == "lower":
        return _lowered(loaded)
    program = capture(loaded.model, loaded.args, loaded.kwargs)
    steps = STAGES[: STAGES.index(stage) + 1]
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        if name in steps:
            program.history.append(apply(name, rewrites, program.graph_module))
    if "pack" in steps:
        program.history.append(pack(program.graph_module, loaded.model, lambda weight: False)[1])
    return program


class _Lowered:
    """The Impl that was chosen for one Op call: what a lowered graph calls there."""

    def __init__(self, op: Op, impl: str) -> None:
        self.op = op
        self.__name__ = self.__qualname__ = f"{op.name}.{impl}"
        self.__module__ = "burnish"
        self._fn: Callable[..., Any] = op.impls[impl].fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fn(*args, **kwargs)


def _lowered(loaded: Loaded) -> Program:
    fast: Any = burnish.optimize(loaded.model, loaded.args, loaded.kwargs)
    served = fast.schedule.served[0]
    if not fast.schedule.programs:
        raise CaptureError(served.kept_original)
    program: Program = fast.schedule.program
    slots = {slot.origin: slot for slot in Executable(program.graph_module, loaded.model).slots}
    lowered = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph_module.graph))
    counts: Counter[str] = Counter()
    for node in lowered.graph.nodes:
        if (slot := slots.get(node.name)) is not None and slot.name in served.choices:
            choice = served.choices[slot.name]
            node.target = _Lowered(slot.op, choice.impl)
            counts[f"{slot.op.name}: {choice.candidate}"] += 1
    lowered.recompile()
    size = len(lowered.graph.nodes)
    notes = [f"the original runs here: {served.kept_original}"] if served.kept_original else []
    record = StepRecord("lower", dict(counts), nodes_before=size, nodes_after=size, notes=notes)
    return replace(program, graph_module=lowered, history=[*program.history, record])


def generated_code(program: Program, model: nn.Module) -> str:
    """The Python that runs this graph: each Op a slot for an Impl, or, once lowered, the Impl."""
    graph = program.graph_module.graph
    if any(isinstance(node.target, _Lowered) for node in graph.nodes):
        return graph.python_code("self").src
    return Executable(program.graph_module, model).source


def op_nodes(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call Ops, or Impls of theirs, by Op, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        op = node.target.op if isinstance(node.target, _Lowered) else op_of(node.target)
        if op is not None:
            found.setdefault(op.name, []).append(node)
    return found


def highlights(program: Program, stage: str) -> list[Match]:
    """What to colour, a colour for each Op: the nodes that call it; after capture those that raising turns into it."""
    groups = op_nodes(program.graph_module) if stage != "capture" else _raisable(program.graph_module)
    return [_group(name, nodes) for name, nodes in groups.items()]


def _raisable(captured: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The captured nodes that become each Op: raising a copy tells whose place an Op took, and which nodes went."""
    raised = fx.GraphModule(captured, copy.deepcopy(captured.graph))
    apply("raise", RAISE, raised)
    left = {node.meta.get("origin") for node in raised.graph.nodes}
    by_name = {node.name: node for node in captured.graph.nodes}
    places = {node: place for place, node in enumerate(captured.graph.nodes)}
    groups: dict[str, list[fx.Node]] = {}
    for name, calls in op_nodes(raised).items():
        found: set[fx.Node] = set()
        todo = [by_name[call.meta["origin"]] for call in calls if call.meta.get("origin") in by_name]
        while todo:
            node = todo.pop()
            found.add(node)
            gone = (n for n in node.all_input_nodes if n.op == "call_function" and n.name not in left)
            todo += [n for n in gone if n not in found]
        groups[name] = sorted(found, key=places.__getitem__)
    return groups


def _group(name: str, nodes: list[fx.Node]) -> Match:
    """All of an Op's nodes as if they were one match, so that they share a colour and a line of the legend."""
    op = OPS[name]
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(parameter) for parameter in op.signature.parameters)
    graph.output(graph.call_function(op.overload, inputs))
    pattern = Pattern.of(fx.GraphModule({}, graph, name))
    return Match(tuple(nodes), bindings={}, outputs=(nodes[-1],), modules={}, anchor=nodes[0], pattern=pattern)


def copy_of(loaded: Loaded) -> nn.Module:
    """A copy of the model; ModelError where memory is too short for it."""
    needed = sum(p.numel() * p.element_size() for p in loaded.model.parameters() if p.device.type == "cpu")
    free = free_memory()
    if free is not None and needed > 0.9 * free:
        raise ModelError(
            f"{loaded.name}: a second copy of its weights needs {human_bytes(needed)}, {human_bytes(free)} are free; "
            "fewer --layers or --dtype bf16 would do"
        )
    return copy.deepcopy(loaded.model)
