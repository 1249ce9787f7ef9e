"""Backtracking search for one pattern at one node: arguments are followed along data-flow edges, names never matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from burnish.graph.index import GraphIndex
from burnish.graph.leaves import LeafCall, is_leaf_call, module_difference
from burnish.graph.normalize import COMMUTATIVE, DIM_ARGUMENTS, Call, describe_key, operation_key
from burnish.graph.prepare import Parameter, Pattern
from burnish.graph.values import attribute_of, is_size_like, rank_of, same_value

# Commutative operators make the search exponential in the worst case; a search this long is given up, and reported.
STEP_LIMIT = 200_000


@dataclass
class Furthest:
    """How far a search came: the pattern nodes that agreed, and the first thing that did not."""

    rank: tuple[int, bool] = (-1, False)
    matched: int = 0
    node: fx.Node | None = None
    reason: str = ""


@dataclass(frozen=True)
class Binding:
    """One solution: pattern nodes to graph nodes, pattern parameters to nodes or constants."""

    nodes: dict[fx.Node, fx.Node]
    parameters: dict[str, Any]
    attributes: dict[str, fx.Node]


@dataclass(frozen=True)
class _Where:
    """The argument that is compared: of which node of the graph, under which name."""

    node: fx.Node
    argument: str


_Goal = tuple[Any, Any, _Where | None]
_Goals = tuple[Any, ...]  # a linked list: () or (goal, rest)


class Search:
    """All ways in which a pattern matches with its first root at a given node."""

    def __init__(self, pattern: Pattern, index: GraphIndex) -> None:
        self.pattern = pattern
        self.index = index
        self.furthest = Furthest()
        self._nodes: dict[fx.Node, fx.Node] = {}
        self._parameters: dict[str, Any] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._trail: list[tuple[dict[Any, Any], Any]] = []
        self._steps = 0

    def solutions(self, anchor: fx.Node, root: fx.Node | None = None) -> Iterator[Binding]:
        """Every solution with the pattern's first root (or the given pattern node and what it needs) at `anchor`."""
        self._undo(0)  # the search before may have been left at its first solution
        self.furthest = Furthest()
        self._steps = 0
        start: _Goal = (root or self.pattern.roots[0], anchor, None)
        rest = () if root is not None else self._root_goals()
        for _ in self._solve((start, rest)):
            if root is not None or self._outputs_differ():
                yield Binding(dict(self._nodes), dict(self._parameters), dict(self._attributes))

    def _root_goals(self) -> _Goals:
        goals: _Goals = ()
        for root in reversed(self.pattern.roots[1:]):
            goals = ((root, None, None), goals)
        return goals

    def _outputs_differ(self) -> bool:
        wanted = set(self.pattern.outputs)
        return len({self._nodes[n] for n in wanted}) == len(wanted)

    # --- the search ---------------------------------------------------------------------------------------------------

    def _solve(self, goals: _Goals) -> Iterator[None]:
        while goals:
            (wanted, found, where), goals = goals
            self._steps += 1
            if self._steps > STEP_LIMIT:
                self._fail(where.node if where else None, f"search given up after {STEP_LIMIT} steps")
                return
            if found is None and where is None:
                yield from self._solve_root(wanted, goals)
                return
            if wanted.op == "placeholder":
                if not self._bind_parameter(self.pattern.parameter_of[wanted], found, where):
                    return
            elif wanted.op == "get_attr":
                if not self._bind_attribute(wanted, found, where):
                    return
            else:
                options = self._match_node(wanted, found, where)
                if not options:
                    return
                for option in options[:-1]:
                    mark = len(self._trail)
                    yield from self._solve(_pushed(option, goals))
                    self._undo(mark)
                goals = _pushed(options[-1], goals)
        yield None

    def _solve_root(self, root: fx.Node, goals: _Goals) -> Iterator[None]:
        if root in self._nodes:
            yield from self._solve(goals)
            return
        taken = {self._nodes[n] for n in self.pattern.roots if n in self._nodes}
        candidates = [n for n in self._connected(root) if n not in taken]
        if not candidates:
            self._fail(
                None, f"there is no further {describe_key(self.pattern.calls[root].key)} for the pattern's {root.name}"
            )
        for candidate in candidates:
            mark = len(self._trail)
            yield from self._solve(((root, candidate, _Where(candidate, "")), goals))
            self._undo(mark)

    def _connected(self, root: fx.Node) -> list[fx.Node]:
        """Candidates for a further root, in graph order: reached from what is bound where the pattern connects them."""
        parents: dict[fx.Node, fx.Node] = {}
        queue = [root]
        for node in queue:
            start = self._image(node)
            if start is not None:
                frontier = {start}
                while node is not root:
                    node = parents[node]
                    steps = (user for n in frontier for user in n.users)
                    frontier = {user for user in steps if self._same_operation(node, user)}
                return sorted(frontier, key=self.index.position.__getitem__)
            for source in node.all_input_nodes:
                if source not in parents:
                    parents[source] = node
                    queue.append(source)
        return self.index.candidates(root, self.pattern.gm)

    def _same_operation(self, wanted: fx.Node, node: fx.Node) -> bool:
        if is_leaf_call(wanted):
            return node.op == "call_module"
        return self.index.keys.get(node) == operation_key(wanted, self.pattern.gm)

    def _image(self, wanted: fx.Node) -> fx.Node | None:
        if wanted in self._nodes:
            return self._nodes[wanted]
        image = self._parameters.get(str(wanted.target)) if wanted.op == "placeholder" else None
        return image if isinstance(image, fx.Node) else None

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        self._trail.append((table, key))

    def _undo(self, mark: int) -> None:
        while len(self._trail) > mark:
            table, key = self._trail.pop()
            del table[key]

    def _fail(self, node: fx.Node | None, reason: str) -> bool:
        # Of two orders of a commutative operation that fail alike, the one that compared operations says more.
        rank = (len(self._nodes), node is not None and node.op.startswith("call"))
        if rank > self.furthest.rank:
            self.furthest = Furthest(rank, len(self._nodes), node, f"{node.name}: {reason}" if node else reason)
        return False

    # --- one node of the pattern at one value of the graph ------------------------------------------------------------

    def _match_node(self, wanted: fx.Node, found: Any, where: _Where | None) -> list[list[_Goal]]:
        """Ways to go on when the pattern's node is `found`; none where it cannot be."""
        if wanted in self._nodes:
            if self._nodes[wanted] is found:
                return [[]]
            self._fail(
                _blame(found, where),
                f"{_argument(where)} is {_shown(found)} where the pattern uses {self._nodes[wanted].name} again",
            )
            return []
        if not isinstance(found, fx.Node):
            self._fail(_blame(found, where), f"{_argument(where)} is {found!r} where the pattern has {wanted.name}")
            return []
        if isinstance(wanted.target, LeafCall):
            options = self._match_leaf(wanted, wanted.target, found)
        else:
            options = self._match_call(wanted, found)
        if options:
            self._set(self._nodes, wanted, found)
        return options

    def _match_leaf(self, wanted: fx.Node, leaf: LeafCall, found: fx.Node) -> list[list[_Goal]]:
        if found.op != "call_module":
            self._fail(found, f"{self._operation(found)} where the pattern has a submodule")
            return []
        if reason := leaf.difference(str(found.target), self.index.gm.get_submodule(str(found.target))):
            self._fail(found, reason)
            return []
        pairs = self._pairs(
            (wanted.args, dict(wanted.kwargs)), (found.args, found.kwargs), _Where(found, "the arguments")
        )
        return [] if pairs is None else [pairs]

    def _match_call(self, wanted: fx.Node, found: fx.Node) -> list[list[_Goal]]:
        ours = self.pattern.calls[wanted]
        if not self._same_operation(wanted, found) or ours.key != self.index.call(found).key:
            self._fail(found, f"{self._operation(found)} where the pattern has {ours}")
            return []
        theirs = self.index.call(found)
        names = list(ours.args)
        if wanted.op == found.op == "call_module":
            pattern_module = self.pattern.gm.get_submodule(str(wanted.target))
            if reason := module_difference(pattern_module, self.index.gm.get_submodule(str(found.target))):
                self._fail(found, reason)
                return []
            names = [n for n in names if n != "train"]
        if ours.args.keys() != theirs.args.keys():
            self._fail(found, f"called with {', '.join(theirs.args)} where the pattern has {', '.join(ours.args)}")
            return []
        options = [self._argument_goals(ours, theirs, names, names, found)]
        # `shape + (n,)` is an add too, one that does not commute: it fits no schema and has no "self".
        plain = "self" in names and ours.args.get("alpha", 1) == 1 == theirs.args.get("alpha", 1)
        if ours.key in COMMUTATIVE and plain:
            swapped = [{"self": "other", "other": "self"}.get(n, n) for n in names]
            if theirs.args["self"] is not theirs.args["other"]:
                options.append(self._argument_goals(ours, theirs, names, swapped, found))
        elif ours.key == "transpose" and options == [None]:
            swapped = [{"dim0": "dim1", "dim1": "dim0"}.get(n, n) for n in names]
            options.append(self._argument_goals(ours, theirs, names, swapped, found))
        return [o for o in options if o is not None]

    def _operation(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return f"is an input ({node.op})"
        key = self.index.call(node).key
        return f"is {describe_key(key[1] if isinstance(key, tuple) else key)}"

    def _argument_goals(
        self, ours: Call, theirs: Call, names: list[str], their_names: list[str], node: fx.Node
    ) -> list[_Goal] | None:
        goals: list[_Goal] = []
        for name, their_name in zip(names, their_names, strict=True):
            pairs = self._pairs(ours.args[name], theirs.args[their_name], _Where(node, name))
            if pairs is None:
                return None
            goals += pairs
        return goals

    def _pairs(self, wanted: Any, found: Any, where: _Where) -> list[_Goal] | None:
        """Compare constants now; return the pairs in which the pattern has a node. None where something differs."""
        if isinstance(wanted, fx.Node):
            return [(wanted, found, where)]
        if isinstance(wanted, slice) and isinstance(found, slice):
            wanted, found = ((s.start, s.stop, s.step) for s in (wanted, found))
        if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
            wanted, found = list(wanted.values()), [found[k] for k in wanted]
        if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
            if len(wanted) != len(found):
                self._fail(where.node, f"{where.argument} has {len(found)} entries where the pattern has {len(wanted)}")
                return None
            goals: list[_Goal] = []
            for ours, theirs in zip(wanted, found, strict=True):
                pairs = self._pairs(ours, theirs, where)
                if pairs is None:
                    return None
                goals += pairs
            return goals
        if self._same_constant(wanted, found, where):
            return []
        shown = f"computed by {found.name}" if isinstance(found, fx.Node) else repr(found)
        self._fail(where.node, f"{where.argument} is {shown} where the pattern has {wanted!r}")
        return None

    def _same_constant(self, wanted: Any, found: Any, where: _Where) -> bool:
        if self.pattern.is_wild_size(where.argument) and type(wanted) is int:
            return isinstance(found, (int, fx.Node))
        if isinstance(found, fx.Node):
            return False
        if same_value(wanted, found):
            return True
        if type(wanted) is int and type(found) is int and where.argument in DIM_ARGUMENTS:
            rank = rank_of(where.node, self.index.call(where.node))
            return rank is not None and (wanted % rank if wanted < 0 else wanted) == (
                found % rank if found < 0 else found
            )
        # 2 and 2.0 are one factor for a floating tensor, not for an integer one.
        numbers = {type(wanted), type(found)} == {int, float}
        value = where.node.meta.get("val")
        return numbers and wanted == found and isinstance(value, torch.Tensor) and value.is_floating_point()

    # --- parameters and attributes ------------------------------------------------------------------------------------

    def _bind_parameter(self, parameter: Parameter, found: Any, where: _Where | None) -> bool:
        if parameter.is_scalar and isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
        if parameter.name in self._parameters:
            bound = self._parameters[parameter.name]
            if same_value(bound, found):
                return True
            return self._fail(
                _blame(found, where),
                f"{_argument(where)} is {_shown(found)}, but {parameter.name} is already {_shown(bound)}",
            )
        if isinstance(found, fx.Node):
            if parameter.is_scalar and not (int in parameter.types and is_size_like(found)):
                return self._fail(
                    _blame(found, where),
                    f"{_argument(where)} is {found.name} where the pattern has the constant {parameter.name}",
                )
        elif reason := parameter.refuses(found):
            return self._fail(_blame(found, where), f"{_argument(where)}: {reason}")
        self._set(self._parameters, parameter.name, found)
        return True

    def _bind_attribute(self, wanted: fx.Node, found: Any, where: _Where | None) -> bool:
        name = str(wanted.target)
        if not isinstance(found, fx.Node) or found.op != "get_attr":
            return self._fail(
                _blame(found, where), f"{_argument(where)} is {_shown(found)} where the pattern has its own {name}"
            )
        if name in self._attributes:
            if self._attributes[name].target == found.target:
                return True
            return self._fail(found, f"is not {self._attributes[name].target}, which the pattern uses here again")
        if not self.pattern.is_state(wanted):
            ours, theirs = (
                attribute_of(gm, str(n.target)) for gm, n in ((self.pattern.gm, wanted), (self.index.gm, found))
            )
            if not same_value(ours, theirs):
                return self._fail(found, "is a constant of another value than the pattern's")
        self._set(self._attributes, name, found)
        return True


def _pushed(new: list[_Goal], goals: _Goals) -> _Goals:
    for goal in reversed(new):
        goals = (goal, goals)
    return goals


def _argument(where: _Where | None) -> str:
    return where.argument if where else "the value"


def _blame(found: Any, where: _Where | None) -> fx.Node | None:
    if where is not None:
        return where.node
    return found if isinstance(found, fx.Node) else None


def _shown(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)
