"""What the rewrites take and make: which nodes of the captured graph went into which nodes of the rewritten one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from burnish.capture import copy_graph
from burnish.graph.matcher import Matches, Pattern
from burnish.lower import op_of
from burnish.report.costs import is_view
from burnish.rewrites import FUSE, RAISE, apply, own
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, names_of_sizes, renamed
from burnish.verify import units_of

_NEAR = 0.6  # of a pattern's nodes: so many agreed where a miss is worth telling
_MUCH = 0.5  # more than before
AT_CAPTURE = "attention, at capture"


@dataclass(frozen=True)
class Fusion:
    """Captured nodes, by name, and the nodes that compute the same now; `rewrite` names the one that did most of it."""

    taken: tuple[str, ...]
    made: tuple[fx.Node, ...]
    rewrite: str = ""

    @property
    def key(self) -> frozenset[str]:
        return frozenset(self.taken)

    @property
    def ops(self) -> list[str]:
        """Names of the Ops in it, each once."""
        return list(dict.fromkeys(op.name for node in self.made if (op := op_of(node.target)) is not None))


@dataclass(frozen=True)
class Miss:
    """Captured nodes, by name, that a rewrite almost took, and why it did not."""

    rewrite: str
    nodes: tuple[str, ...]
    reason: str


@dataclass
class Rewritten:
    """A copy of a captured graph after the user's rewrites (`own`, by name) and the default raise and fuse steps."""

    graph_module: fx.GraphModule
    fusions: list[Fusion]
    misses: list[Miss] = field(default_factory=list)
    own: tuple[str, ...] = ()


def rewritten(captured: fx.GraphModule, rewrites: Sequence[Rewrite] = ()) -> Rewritten:
    """Applies `rewrites` and the default steps to a copy of the captured graph."""
    with _use_lazy_graph_module(True):  # nothing runs the copy: no code for it after each rewrite
        copy = _make_graph_module(captured, copy_graph(captured.graph))
        watcher = _Watcher(copy, captured.graph)
        for name, step in (("rewrite", own(rewrites)), ("raise", RAISE), ("fuse", FUSE)):
            apply(name, step, copy, watcher)
    fusions = [replace(each, rewrite=watcher.rewrite_of(each)) for each in fusions_of(copy.graph, captured.graph)]
    return Rewritten(copy, fusions, watcher.misses, tuple(rewrite.name for rewrite in rewrites))


def fusions_of(graph: fx.Graph, captured: fx.Graph) -> list[Fusion]:
    """What became of the captured graph wherever an Op stands now, in the order of execution.

    Values that both graphs compute are the borders. Units (see `burnish.verify`) that share an Op, as the parts of a
    merged product do, are one fusion.
    """
    read = _read(graph)
    units = [unit for unit in units_of(graph, captured) if unit.node in read]
    shared = {node.meta.get("origin") for node in read}
    fusion_of_op: dict[fx.Node, int] = {}
    groups: dict[int, list[int]] = {}
    for number, unit in enumerate(units):
        ops = [node for node in unit.inner if op_of(node.target) is not None]
        merged = sorted({fusion_of_op[op] for op in ops if op in fusion_of_op})
        home = merged[0] if merged else number
        members = groups.setdefault(home, [])
        members.append(number)
        fusion_of_op.update(dict.fromkeys(ops, home))
        for other in merged[1:]:
            members += groups.pop(other)
            fusion_of_op.update(dict.fromkeys((op for op, place in fusion_of_op.items() if place == other), home))
    found, seen = [], set[fx.Node]()
    for members in groups.values():
        taken: dict[fx.Node, None] = {}
        made: dict[fx.Node, None] = {}
        for number in members:
            taken.update(dict.fromkeys(_replaced(units[number].origin, shared)))
            made.update(dict.fromkeys(units[number].inner))
        # What several fusions need, a mask that all layers read say, is the first one's.
        own = {node for node in (*taken, *made) if node not in seen}
        seen |= own
        found.append(Fusion(tuple(n.name for n in taken if n in own), tuple(n for n in made if n in own)))
    return found


def _read(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs need: a rewrite leaves others behind, until dead code is removed."""
    found = set[fx.Node]()
    pending = [graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _replaced(origin: fx.Node, shared: set[str | None]) -> list[fx.Node]:
    """The captured nodes from the nearest values that both graphs compute to `origin`."""
    found: dict[fx.Node, None] = {}
    pending = [origin]
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += [n for n in node.all_input_nodes if n.op == "call_function" and n.name not in shared]
    return list(found)


class _Watcher:
    """Notes what each rewrite took, and what was almost taken."""

    def __init__(self, graph_module: fx.GraphModule, captured: fx.Graph) -> None:
        self._graph, self._captured, self._sizes = graph_module.graph, captured, names_of_sizes(captured)
        self._names = {node.name for node in captured.nodes}
        self._views = {node.name for node in captured.nodes if is_view(node.target)}
        self._taken: dict[frozenset[str], tuple[str, list[str]]] = {}  # in the order in which it happened
        self.misses: list[Miss] = []
        self._note_taken(AT_CAPTURE)

    def __call__(self, rewrite: Rewrite | GraphPass, found: Matches | Outcome, pattern: Pattern | None) -> None:
        if found.count if isinstance(found, Outcome) else found:
            self._note_taken(rewrite.name)
        by_name = {node.name: node for node in self._graph.nodes}
        if isinstance(found, Outcome):
            for text in found.refused:
                name, _, reason = text.partition(": ")
                self._note(rewrite.name, [by_name[name]] if name in by_name else [], reason, by_name)
            return
        for match, reason in found.refused:
            self._note(rewrite.name, match.nodes, reason.partition(": ")[2], by_name)
        if not found and not found.refused and found.near_misses and pattern is not None:
            nearest = found.near_misses[0]
            if nearest.node is None or op_of(nearest.node.target) is not None:
                return  # what is an Op already has been recognised as something else
            if nearest.matched > max(1, _NEAR * len(pattern.nodes)):
                self._note(rewrite.name, [nearest.node], nearest.reason, by_name)

    def rewrite_of(self, fusion: Fusion) -> str:
        """The last rewrite that made other Ops of what was there, put several Ops together, or took much in."""
        named, ops, whole = "", list[str](), fusion.key
        earlier: list[frozenset[str]] = []
        for taken, (rewrite, made) in self._taken.items():
            if not taken <= whole:
                continue
            parts = [part for part in earlier if part < taken and not any(part < other for other in earlier)]
            before = sum(map(self._weight, parts))
            if made != ops or len(parts) > 1 or self._weight(taken) >= (1 + _MUCH) * before:
                named, ops = rewrite, made
            earlier.append(taken)
        return named

    def _note_taken(self, rewrite: str) -> None:
        for fusion in fusions_of(self._graph, self._captured):
            self._taken.setdefault(fusion.key, (rewrite, fusion.ops))

    def _weight(self, names: frozenset[str]) -> int:
        """How many of them are no views."""
        return len(names - self._views)

    def _note(self, rewrite: str, nodes: Iterable[fx.Node], reason: str, by_name: Mapping[str, fx.Node]) -> None:
        """In the captured graph's names: the user knows no others."""
        origins = [self._origin(node) for node in nodes if not node._erased]

        def name_of(word: str) -> str | None:
            return self._sizes.get(word) or (self._origin(by_name[word]) if word in by_name else None)

        reason = renamed(reason.removeprefix("guard: "), name_of)
        self.misses.append(Miss(rewrite, tuple(dict.fromkeys(filter(None, origins))), reason))

    def _origin(self, node: fx.Node) -> str | None:
        """The captured node whose value this one has; of several results' Op, of the first result."""
        for candidate in (node, *node.users):
            if (name := candidate.meta.get("origin")) in self._names:
                return str(name)
        return None
