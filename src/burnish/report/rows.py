"""A graph that ran, or that is only predicted, as blocks of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from burnish.lower import op_of
from burnish.report.costs import Work
from burnish.report.data import Block, Kernel, OpRow
from burnish.report.fold import Folding
from burnish.report.kernels import Launches, merged
from burnish.report.predict import CostModel
from burnish.report.where import path_of, source_of

# Of the Ops whose Impls are several kernels on a GPU; the others are one.
_KERNELS = {
    "linear_add_layer_norm": 2,
    "linear_add_rms_norm": 2,
    "gated_mlp": 2,
    "rms_norm_gated_mlp": 2,
}


@dataclass
class Seen:
    """A graph at the sizes of one call.

    work: of every node that computes tensors. us: of those that were timed. launches: what ran for them.
    names: what a node is called in the report where that is not its target. impls: which Impl an Op runs by.
    """

    graph_module: fx.GraphModule
    work: dict[fx.Node, Work]
    us: Mapping[fx.Node, float] = field(default_factory=dict)
    launches: Launches = field(default_factory=dict)
    names: Mapping[fx.Node, str] = field(default_factory=dict)
    impls: Mapping[fx.Node, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """Those that have a row, in the order of execution."""
        return list(self.work)

    def name(self, node: fx.Node) -> str:
        """ "aten.linear" or "burnish.attention"."""
        return self.names.get(node) or target_name(node)

    def kernels(self, node: fx.Node) -> int:
        """As how many kernels the node would run on a GPU."""
        op = op_of(node.target)
        if self.work[node].kind == "free":
            return 0
        return _KERNELS.get(op.name, 1) if op is not None else 1

    def predict_us(self, node: fx.Node, model: CostModel) -> float:
        """What these would take."""
        by_torch = self.name(node).startswith("aten.")
        return model.predict_us(self.work[node], kernels=self.kernels(node), by_torch=by_torch)


def target_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema is not None else getattr(node.target, "__name__", str(node.target))


def folding_of(seen: Seen) -> Folding:
    """The blocks of a captured graph: layers fold that make the same calls on the same shapes."""

    def alike(node: fx.Node) -> Any:
        work = seen.work[node]
        return None if work.kind == "free" else (seen.name(node), work.inputs, work.output)

    return Folding(seen.nodes, alike)


@dataclass(frozen=True)
class Rows:
    """The blocks, and in which block's row each node counts: (the block's path, the row's name)."""

    blocks: tuple[Block, ...]
    row_of: Mapping[fx.Node, tuple[str, str]]


def row_names(nodes: Sequence[fx.Node], seen: Seen, rows: Rows) -> tuple[str, ...]:
    """The rows of those nodes that are no views; where all are views, of these."""
    working = [node for node in nodes if seen.work[node].kind != "free"]
    return tuple(dict.fromkeys(rows.row_of[node][1] for node in working or nodes))


def rows_of(seen: Seen, folding: Folding, model: CostModel) -> Rows:
    """Nodes of folded layers share a row where they make the same call, as its nth in the same submodule. What a row
    tells is of its first node, times are sums over all of them by the number of layers."""
    groups: list[dict[Any, list[fx.Node]]] = []
    met: Counter[Any] = Counter()
    for node in seen.nodes:
        place = folding.place(path_of(node))
        groups += [{} for _ in range(len(folding.blocks) - len(groups))]
        call = place.module, seen.name(node)
        nth = met[place.block, place.repeat, call]
        met[place.block, place.repeat, call] += 1
        groups[place.block].setdefault((*call, nth), []).append(node)
    blocks, row_of = [], {}
    for folded, rows in zip(folding.blocks, groups, strict=True):
        if not rows:
            continue
        count = len(folded.paths)
        made = [_row(seen, nodes, module, count, model) for (module, _, _), nodes in rows.items()]
        blocks.append(Block(folded.path, folded.kind, count, tuple(made)))
        for nodes in rows.values():
            row_of.update(dict.fromkeys(nodes, (folded.path, nodes[0].name)))
    return Rows(tuple(blocks), row_of)


def _row(seen: Seen, nodes: Sequence[fx.Node], module: str, count: int, model: CostModel) -> OpRow:
    first = nodes[0]
    work, source = seen.work[first], source_of(first)
    us = sum(seen.us[node] for node in nodes) / count if seen.us else None
    floor_us = sum(model.floor_us(seen.work[node]) for node in nodes) / count
    predicted_us = sum(seen.predict_us(node, model) for node in nodes) / count
    launches = [launch for node in nodes for launch in seen.launches.get(node, ())]
    if us is None and (kernels := sum(map(seen.kernels, nodes)) / count):
        ran: tuple[Kernel, ...] = (Kernel(seen.name(first), kernels, predicted_us),)
    else:
        ran = merged(launches, us or 0.0, count)
    return OpRow(
        name=first.name,
        op=seen.name(first),
        module=module,
        source=source.place,
        code=source.code,
        inputs=work.inputs,
        output=work.output,
        dtype=str(work.dtype).removeprefix("torch."),
        flops=sum(seen.work[node].flops for node in nodes) / count,
        bytes=sum(seen.work[node].bytes for node in nodes) / count,
        # What is faster than its bytes could come from memory had them in the cache: its time is its floor.
        floor_us=floor_us if us is None else min(floor_us, us),
        predicted_us=predicted_us,
        bound=model.bound(work),
        us=us,
        kernels=ran,
        impl=seen.impls.get(first),
    )
