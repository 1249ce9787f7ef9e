"""A Program taken as far as the user wants to see it, and what of its graph to colour."""

from __future__ import annotations

import copy

from torch import fx, nn

from burnish._text import human_bytes
from burnish.capture import Program, capture
from burnish.graph.matcher import Match, Pattern
from burnish.lower import Executable, op_of
from burnish.models import Loaded, ModelError, free_memory
from burnish.op import OPS
from burnish.pack import pack
from burnish.rewrites import FUSE, RAISE, apply

STAGES = ("capture", "raise", "fuse", "pack")


def program_at(loaded: Loaded, stage: str) -> Program:
    """The Program after `stage`. CaptureError where the model cannot be captured.

    Which weights are also stored (K, N) is measured when optimizing; it changes no node, and is left out here.
    """
    program = capture(loaded.model, loaded.args, loaded.kwargs)
    steps = STAGES[: STAGES.index(stage) + 1]
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        if name in steps:
            program.history.append(apply(name, rewrites, program.graph_module))
    if "pack" in steps:
        program.history.append(pack(program.graph_module, loaded.model, lambda weight: False)[1])
    return program


def generated_code(program: Program, model: nn.Module) -> str:
    """The Python that runs this graph, each Op a slot for an Impl."""
    return Executable(program.graph_module, model).source


def op_nodes(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call Ops, by Op, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if (op := op_of(node.target)) is not None:
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
