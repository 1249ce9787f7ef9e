"""The pieces of an Explanation that show one block: its graph before and after, and its kernels in time."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch import fx

from burnish.report.data import Block, GraphPicture, Span
from burnish.report.fold import Folding
from burnish.report.fusions import Fusion
from burnish.report.rows import Rows, Seen
from burnish.report.where import path_of


def costliest_block(blocks: Iterable[Block]) -> Block | None:
    """At all its places together."""
    return max(blocks, key=lambda block: block.us * block.count, default=None)


def nodes_of(seen: Seen, folding: Folding, block: Block) -> list[fx.Node]:
    """The block's nodes in the first of the folded layers."""
    found = []
    for node in seen.nodes:
        place = folding.place(path_of(node))
        if folding.blocks[place.block].path == block.path and place.repeat == 0:
            found.append(node)
    return found


def timeline_of(seen: Seen, rows: Rows, nodes: Iterable[fx.Node]) -> tuple[Span, ...]:
    """What ran for these nodes: on CUDA as it ran, on the CPU one after the other, without what was between them."""
    launches = [(node, launch) for node in nodes for launch in seen.launches.get(node, ())]
    if not launches:
        return ()
    on_device = any(launch.grid for _, launch in launches)
    first = min(launch.start_us for _, launch in launches)
    spans, at = [], 0.0
    for node, launch in sorted(launches, key=lambda pair: pair[1].start_us):
        start = launch.start_us - first if on_device else at
        spans.append(Span(launch.name, rows.row_of[node][1], start, launch.us + launch.beside_us))
        at = start + launch.us
    return tuple(spans)


def groups_of(fusions: Iterable[Fusion], before: Seen) -> dict[str, str]:
    """What a node of either graph is part of, by its name: of every fusion that takes more than one op."""
    working = {node.name for node in before.nodes if before.work[node].kind != "free"}
    groups: dict[str, str] = {}
    for fusion in fusions:
        if len(working.intersection(fusion.taken)) > 1:
            ops = [node for node in fusion.made if node.op == "call_function"]
            group = f"{' + '.join(fusion.ops)}: {fusion.taken[0]}"
            groups |= dict.fromkeys((*fusion.taken, *(node.name for node in ops)), group)
    return groups


def picture(title: str, nodes: Iterable[fx.Node], seen: Seen, groups: Mapping[str, str]) -> GraphPicture:
    """The nodes, what flows into them from elsewhere, and who reads whom. Parts of a tuple stand for the whole; what
    only weights go into is left out."""
    inside = [node for node in nodes if any(source.op != "get_attr" for source in node.all_input_nodes)]
    drawn = dict.fromkeys(inside)
    edges: dict[tuple[str, str], None] = {}
    outside: dict[fx.Node, None] = {}
    for node in inside:
        for source in map(_whole, node.all_input_nodes):
            if source in drawn or source in seen.work or source.op == "placeholder":
                edges[source.name, node.name] = None
                if source not in drawn:
                    outside[source] = None
    boxes = [(node.name, "", "") for node in outside]
    boxes += [(node.name, seen.name(node), groups.get(node.name, "")) for node in inside]
    return GraphPicture(title, tuple(boxes), tuple(edges))


def _whole(node: fx.Node) -> fx.Node:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
