"""Find every place where a pattern occurs in a graph, and say why it does not occur elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from burnish.graph.effects import alias_roots, input_nodes, is_pure, mutated_args, mutated_roots, nodes_between
from burnish.graph.index import GraphIndex
from burnish.graph.leaves import LeafCall
from burnish.graph.normalize import describe_key
from burnish.graph.prepare import Parameter, Pattern
from burnish.graph.search import Binding, Search

__all__ = [
    "Explanation",
    "GraphIndex",
    "Guard",
    "Match",
    "Matches",
    "NearMiss",
    "Parameter",
    "Pattern",
    "explain_match",
    "find_matches",
]


@dataclass(frozen=True, eq=False)
class Match:
    """One occurrence of a pattern.

    nodes:      the nodes that compute the pattern, in graph order; neither its inputs nor its parameters and buffers
    bindings:   what each parameter of the pattern stands for here: a node, or a constant
    outputs:    the nodes of the pattern's results, in the order in which the pattern returns them
    modules:    submodules of the pattern -> paths of the model's submodules found for them
    attributes: parameters and buffers of the pattern -> the `get_attr` nodes found for them
    anchor:     the node at which the search began: the first of the pattern's results that no other result needs
    """

    nodes: tuple[fx.Node, ...]
    bindings: dict[str, Any]
    outputs: tuple[fx.Node, ...]
    modules: dict[str, str]
    anchor: fx.Node
    attributes: dict[str, fx.Node] = field(default_factory=dict)
    pattern: Pattern | None = field(default=None, repr=False)


@dataclass(frozen=True)
class NearMiss:
    """Where the search for a pattern stopped: the graph's node, how many pattern nodes agreed, and what did not."""

    node: fx.Node | None
    matched: int
    reason: str

    def __str__(self) -> str:
        return f"{self.matched} nodes agreed, then {self.reason}"


class Matches(list[Match]):
    """The accepted matches in graph order, and what was almost one.

    near_misses: best first; refused: matches that were turned down, with the reason (overlap, escape, cycle, guard).
    """

    def __init__(self, accepted: Iterable[Match] = ()) -> None:
        super().__init__(accepted)
        self.near_misses: list[NearMiss] = []
        self.refused: list[tuple[Match, str]] = []


Guard = Callable[[Match], "str | bool | None"]
PatternLike = Callable[..., Any] | nn.Module | Pattern


def find_matches(
    gm: fx.GraphModule,
    pattern: PatternLike,
    *,
    guard: Guard | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    index: GraphIndex | None = None,
) -> Matches:
    """Every occurrence of `pattern` in `gm`, in graph order; nothing is changed.

    Data-flow edges, operations, types and constants decide, names never do. A match is refused where an intermediate
    value is used elsewhere, where a path through other nodes would make a cycle, where an in-place operation lies
    between, where it shares nodes with an earlier match, or where `guard` gives a reason (a string, or False).

    example_inputs: trace the pattern to ATen operators with these, for a graph that came from `torch.export`.
    index: a `GraphIndex` of the unchanged graph, to share among several searches.

    Raises TypeError or ValueError in one line for a pattern that cannot be matched.
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"gm must be a torch.fx.GraphModule (see burnish.graph.trace), got {type(gm).__name__}")
    prepared = Pattern.of(pattern, example_inputs)
    index = index or GraphIndex(gm)
    finder = _Finder(prepared, index, guard)
    for anchor in index.candidates(prepared.roots[0], prepared.gm):
        finder.try_anchor(anchor)
    return finder.finish()


class _Finder:
    """Collects the matches of one pattern in one graph, refusing what may not be rewritten."""

    def __init__(self, pattern: Pattern, index: GraphIndex, guard: Guard | None) -> None:
        self.pattern, self.index, self.guard = pattern, index, guard
        self.gm = index.gm
        self.search = Search(pattern, index)
        self.matches = Matches()
        self.owner: dict[fx.Node, Match] = {}
        self.misses: list[NearMiss] = []
        self._mutators: list[fx.Node] | None = None

    def try_anchor(self, anchor: fx.Node) -> None:
        refusals: dict[Any, tuple[Match, str]] = {}
        for binding in self.search.solutions(anchor):
            match = self._match(anchor, binding)
            place = (match.nodes, match.outputs)
            if place in refusals and self.guard is None:
                continue  # the same nodes with inputs swapped
            reason = self._refusal(match)
            if reason is None:
                self.matches.append(match)
                self.owner.update(dict.fromkeys(match.nodes, match))
                return
            refusals.setdefault(place, (match, reason))
        self.matches.refused += refusals.values()
        for _, reason in refusals.values():
            self.misses.append(NearMiss(anchor, len(self.pattern.nodes), reason))
        if not refusals:
            furthest = self.search.furthest
            self.misses.append(NearMiss(furthest.node or anchor, furthest.matched, furthest.reason))

    def finish(self) -> Matches:
        if not self.matches and not any(miss.matched for miss in self.misses):
            self._look_for_parts()
        self.matches.near_misses = sorted(self.misses, key=lambda miss: -miss.matched)
        return self.matches

    def _look_for_parts(self) -> None:
        """Nothing ends like the pattern: find the largest part of it that is there, and what follows it instead."""
        root = self.pattern.roots[0]
        for part in reversed(self.pattern.nodes):
            followers = [user for user in part.users if user in self.pattern.calls]
            for anchor in self.index.candidates(part, self.pattern.gm) if followers else ():
                solution = next(self.search.solutions(anchor, part), None)
                if solution is None:
                    continue
                wanted = describe_key(self.pattern.calls[followers[0]].key)
                user = next(iter(anchor.users), anchor)
                reason = f"{user.name}: follows {anchor.name} where the pattern has {wanted}"
                self.misses.append(NearMiss(user, len(solution.nodes), reason))
                return
        if not self.misses:
            wanted = describe_key(self.pattern.calls[root].key)
            self.misses.append(NearMiss(None, 0, f"the graph has no {wanted}, with which the pattern ends"))

    # --- one solution -------------------------------------------------------------------------------------------------

    def _match(self, anchor: fx.Node, binding: Binding) -> Match:
        modules: dict[str, str] = {}
        for wanted in self.pattern.nodes:
            found = binding.nodes[wanted]
            if found.op != "call_module":
                continue
            if isinstance(wanted.target, LeafCall):
                label = wanted.target.label
                repeats = sum(name == label or name.startswith(f"{label}#") for name in modules)
                modules[f"{label}#{repeats + 1}" if repeats else label] = str(found.target)
            elif wanted.op == "call_module":
                modules[str(wanted.target)] = str(found.target)
        return Match(
            nodes=tuple(sorted(set(binding.nodes.values()), key=self.index.position.__getitem__)),
            bindings={**{p: binding.parameters[p] for p in self.pattern.parameters}, **self.pattern.fixed},
            outputs=tuple(binding.nodes[n] for n in self.pattern.outputs),
            modules=modules,
            anchor=anchor,
            attributes=binding.attributes,
            pattern=self.pattern,
        )

    def _refusal(self, match: Match) -> str | None:
        inside = set(match.nodes)
        for check in (self._own_input, self._escape, self._cycle, self._mutation, self._overlap):
            if reason := check(match, inside):
                return reason
        if self.guard is not None:
            answer = self.guard(match)
            if answer is False:
                return f"{match.anchor.name}: guard: refused"
            if isinstance(answer, str):
                return f"{match.anchor.name}: guard: {answer}"
        return None

    def _own_input(self, match: Match, inside: set[fx.Node]) -> str | None:
        """A parameter bound to a node that the match computes: the replacement would need what it replaces."""
        for name, value in match.bindings.items():
            for node in input_nodes((value,)):
                if node in inside:
                    return f"{node.name}: is the input {name} of the match that computes it, which would make a cycle"
        return None

    def _escape(self, match: Match, inside: set[fx.Node]) -> str | None:
        for node in match.nodes:
            if node not in match.outputs:
                for user in node.users:
                    if user not in inside:
                        return f"{node.name}: used outside the match by {user.name}"
        return None

    def _cycle(self, match: Match, inside: set[fx.Node]) -> str | None:
        """A path out of the match and back into it: only several results make that possible."""
        if len(match.nodes) == 1 or len(set(match.outputs)) == 1:
            return None
        last = self.index.position[match.nodes[-1]]
        pending = [(user, user) for node in match.outputs for user in node.users if user not in inside]
        seen: set[fx.Node] = set()
        moved = False
        while pending:
            node, start = pending.pop()
            if node in inside:
                return f"{node.name}: needs {start.name}, which needs the match: rewriting would make a cycle"
            if node in seen:
                continue
            seen.add(node)
            moved |= self.index.position[node] < last
            # An accepted match is going to be one node: whatever needs any result of it comes after all of its inputs.
            other = self.owner.get(node)
            leaving = (
                node.users if other is None else [u for out in other.outputs for u in out.users if u not in other.nodes]
            )
            pending += [(user, start) for user in leaving]
        if moved:
            for node in nodes_between(match.nodes[0], match.nodes[-1]):
                if node not in inside and node.op != "placeholder" and not is_pure(node, self.gm):
                    return f"{node.name}: has side effects, and users of the match would have to move past it"
        return None

    def _mutation(self, match: Match, inside: set[fx.Node]) -> str | None:
        """An in-place operation that would see, or be seen by, the rewritten nodes at another moment than now."""
        if self._mutators is None:
            self._mutators = [n for n in self.index.position if mutated_args(n, self.gm)]
        if not self._mutators:
            return None
        first, last = (self.index.position[n] for n in (match.nodes[0], match.nodes[-1]))
        touched = alias_roots((n for node in match.nodes for n in (node, *node.all_input_nodes)), self.gm)
        for mutator in self._mutators:
            position = self.index.position[mutator]
            if mutator not in inside:
                if first < position < last and mutated_roots([mutator], self.gm) & touched:
                    return f"{mutator.name}: changes in place, between the nodes of the match, what the match uses"
                continue
            changed = mutated_args(mutator, self.gm)
            for base in (*changed, *alias_roots(changed, self.gm)):
                for user in base.users:
                    if user not in inside and self.index.position[user] > position and base not in match.outputs:
                        return f"{mutator.name}: changes {base.name} in place, which {user.name} uses afterwards"
        return None

    def _overlap(self, match: Match, inside: set[fx.Node]) -> str | None:
        for node in match.nodes:
            if node in self.owner:
                return f"{node.name}: belongs already to the match at {self.owner[node].anchor.name}"
        return None


@dataclass(frozen=True)
class Explanation:
    """Why a pattern matches as often as it does: print it."""

    pattern: str
    matches: Matches

    def __iter__(self) -> Iterator[NearMiss]:
        return iter(self.matches.near_misses)

    def __str__(self) -> str:
        count = len(self.matches)
        lines = [f"{self.pattern}: {count} match{'' if count == 1 else 'es'}"]
        lines += [f"  at {match.anchor.name}: {', '.join(n.name for n in match.nodes)}" for match in self.matches]
        misses = self.matches.near_misses
        if misses:
            lines.append(f"  nearest miss: {misses[0]}")
            lines += [f"  also: {miss}" for miss in misses[1:4]]
        return "\n".join(lines)


def explain_match(
    gm: fx.GraphModule,
    pattern: PatternLike,
    *,
    guard: Guard | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> Explanation:
    """How often `pattern` matches in `gm`, and for the nearest misses the first node that differed and why."""
    prepared = Pattern.of(pattern, example_inputs)
    return Explanation(prepared.name, find_matches(gm, prepared, guard=guard))
