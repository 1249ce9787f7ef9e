"""A Program taken as far as the user wants to see it, and what of its graph to colour."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import fx, nn

from burnish._text import human_bytes
from burnish.capture import Program, capture
from burnish.graph.matcher import Match, Pattern, find_matches
from burnish.lower import Executable, op_of
from burnish.models import Loaded, ModelError, free_memory
from burnish.op import OPS
from burnish.pack import pack
from burnish.rewrites import FUSE, RAISE, Rewrite, apply
from burnish.rewrites.rewrite import floating_dtypes

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
    """What to colour, one colour for each Op: the nodes that call it, and after capture those that raising will turn into it."""
    groups = op_nodes(program.graph_module)
    if stage == "capture":
        taken = {node for nodes in groups.values() for node in nodes}
        for name, match in _raisable(program.graph_module):
            if taken.isdisjoint(match.nodes):
                taken.update(match.nodes)
                groups.setdefault(name, []).extend(match.nodes)
    return [_group(name, nodes) for name, nodes in groups.items()]


def _raisable(graph_module: fx.GraphModule) -> Iterator[tuple[str, Match]]:
    dtypes = floating_dtypes(graph_module.graph)
    for rewrite in RAISE:
        if not isinstance(rewrite, Rewrite):
            continue
        for dtype in dtypes if rewrite.examples else dtypes[:1]:
            for match in find_matches(graph_module, rewrite.prepared(dtype), guard=rewrite.guard):
                yield rewrite.name.split(":")[0], match


def _group(name: str, nodes: list[fx.Node]) -> Match:
    """All of an Op's nodes as if they were one match, so that they share a colour and a line of the legend."""
    op = OPS[name]
    graph = fx.Graph()
    graph.output(graph.call_function(op.overload, tuple(graph.placeholder(parameter) for parameter in op.signature.parameters)))
    pattern = Pattern.of(fx.GraphModule({}, graph, name))
    return Match(tuple(nodes), bindings={}, outputs=(nodes[-1],), modules={}, anchor=nodes[0], pattern=pattern)


def copy_of(loaded: Loaded) -> nn.Module:
    """A copy of the model; ModelError where memory is too short for it."""
    needed = sum(p.numel() * p.element_size() for p in loaded.model.parameters() if p.device.type == "cpu")
    free = free_memory()
    if free is not None and needed > 0.9 * free:
        raise ModelError(
            f"{loaded.name}: a second copy of its weights needs {human_bytes(needed)} and {human_bytes(free)} are free here; "
            "fewer --layers or --dtype bf16 would do"
        )
    return copy.deepcopy(loaded.model)
