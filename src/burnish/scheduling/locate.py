"""From what `find` found to a graph that can be rewritten.

`find` may have traced the whole model. What is rewritten is as little as possible: the innermost module that makes all
calls of a match is traced anew, with its submodules kept whole but those that the match reaches into, and the match is
carried over: its nodes are told by who calls what for the how manieth time, and every edge is compared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from burnish.graph import Match
from burnish.graph.effects import input_nodes
from burnish.scheduling.find import FoundModule, Result, has_no_forward
from burnish.scheduling.tracer import PARENT, Known
from burnish.scheduling.tracing import TracedModule, trace_variants
from burnish.scheduling.tree import Tree, common_path, join

# Whose forward makes the call, node.op, the target with its whole path; of an element also the container's, and which.
_Key = tuple[Any, ...]


@dataclass
class Site:
    """A module to be rewritten: where it is, its graph (nobody else's), and the matches in that."""

    path: str
    owner: nn.Module
    gm: TracedModule
    matches: list[Match]


class _Elsewhere(Exception):
    """Why a match is not in a graph."""


@dataclass
class _Plan:
    """The results that one module is rewritten for, and the modules that they reach into."""

    results: list[Result] = field(default_factory=list)
    parents: set[str] = field(default_factory=set)


def locate(tree: Tree, results: Sequence[Result], known: Callable[[nn.Module], Known | None]) -> list[Site]:
    """The modules that make the calls of `results`, as graphs with these as matches; nothing is changed.

    Args:
        known: what is known of the calls of a module.

    Raises ValueError, in one line, where a match is no longer there or cannot be rewritten.
    """
    plans: dict[str, _Plan] = {}
    for result in results:
        result.origin.check_fresh(tree)
        parents = _parents(tree, result)
        owner = _with_forward(tree, common_path(parents))
        plan = plans.setdefault(owner, _Plan())
        plan.results.append(result)
        plan.parents.update(parents)
    _absorb(plans)
    return [_site(tree, path, plan, known(tree.at(path))) for path, plan in plans.items()]


def _parents(tree: Tree, result: Result) -> list[str]:
    if isinstance(result, FoundModule):
        return [_with_forward(tree, result.path.rpartition(".")[0])]
    pairs = [result] if isinstance(result, tuple) else result
    return [join(result.origin.base, parent) for parent, _ in pairs]


def _with_forward(tree: Tree, path: str) -> str:
    while path and has_no_forward(tree.at(path)):
        path = path.rpartition(".")[0]
    return path


def _absorb(plans: dict[str, _Plan]) -> None:
    """A module inside another that is rewritten too becomes part of that."""
    for path in sorted(plans, key=len):
        for inner in [other for other in plans if other != path and (not path or other.startswith(f"{path}."))]:
            if path in plans:
                absorbed = plans.pop(inner)
                plans[path].results += absorbed.results
                plans[path].parents |= absorbed.parents


def _site(tree: Tree, path: str, plan: _Plan, known: Known | None) -> Site:
    owner = tree.at(path)
    start = len(path) + 1 if path else 0
    inlined = {parent[start:] for parent in plan.parents if parent != path}
    reason = ""
    for gm in trace_variants(owner, path, inlined, known):
        try:
            matches = [_carried(result, gm, path) for result in plan.results]
        except _Elsewhere as error:
            reason = reason or str(error)
            continue
        return Site(path, owner, gm, _in_order(_distinct(matches), gm.graph))
    raise ValueError(f"match: it cannot be rewritten in {path or type(owner).__name__}: {reason}")


def _distinct(matches: list[Match]) -> list[Match]:
    """A module that is used in two places is found twice and rewritten once."""
    return list({match.nodes: match for match in matches}.values())


def _in_order(matches: list[Match], graph: fx.Graph) -> list[Match]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(matches, key=lambda match: position[match.nodes[0]])


# --- one match --------------------------------------------------------------------------------------------------------


def _carried(result: Result, gm: TracedModule, path: str) -> Match:
    here = _Numbered.of(gm.graph, path)
    if isinstance(result, FoundModule):
        return _call_of(result, here)
    there = _Numbered.of(result.graph, result.root)
    match = result.match
    image = {node: here.like(there, node) for node in match.nodes}
    for old, new in list(image.items()):
        olds, news = (input_nodes((node.args, node.kwargs)) for node in (old, new))
        if len(olds) != len(news):
            raise _Elsewhere(f"{old.name} is called with other arguments there")
        for a, b in zip(olds, news, strict=True):
            if image.setdefault(a, b) is not b:
                raise _Elsewhere(f"{a.name} is two values there, {image[a].name} and {b.name}")
    nodes = tuple(image[node] for node in match.nodes)
    outputs = tuple(image[node] for node in match.outputs)
    check_closed(nodes, outputs)
    return Match(
        nodes=nodes,
        bindings={name: map_arg(value, image.__getitem__) for name, value in match.bindings.items()},
        outputs=outputs,
        modules={name: _relative(join(result.root, module), path) for name, module in match.modules.items()},
        anchor=image[match.anchor],
        attributes={name: image[node] for name, node in match.attributes.items()},
        pattern=match.pattern,
    )


def check_closed(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
    """ValueError where a value that is not a result is used outside."""
    for node in nodes:
        if node not in outputs:
            for user in node.users:
                if user not in nodes:
                    where = "the module's result" if user.op == "output" else user.name
                    raise ValueError(f"match: {node.name} is used outside the match by {where}")


def _call_of(result: FoundModule, here: _Numbered) -> Match:
    calls = [node for node, key in here.keys.items() if key[1:] == ("call_module", result.path)]
    if len(calls) != 1:
        raise _Elsewhere(f"{result.path} is called {len(calls)} times there")
    (node,) = calls
    target = str(node.target)
    return Match((node,), {}, (node,), {target: target}, node)


def _relative(path: str, base: str) -> str:
    return path[len(base) + 1 :] if base else path


@dataclass
class _Numbered:
    """The nodes of a graph by key and number: the how manieth with that key each one is."""

    keys: dict[fx.Node, _Key]
    by_key: dict[_Key, list[fx.Node]]

    @classmethod
    def of(cls, graph: fx.Graph, root: str) -> _Numbered:
        keys: dict[fx.Node, _Key] = {}
        by_key: dict[_Key, list[fx.Node]] = {}
        for node in graph.nodes:
            if PARENT not in node.meta or node.op in ("placeholder", "output"):
                continue
            target = join(root, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
            keys[node] = (join(root, node.meta[PARENT]), node.op, target)
            if target is operator.getitem:  # a submodule kept whole has its results unpacked, an inlined one has not
                container, index = node.args
                key = keys.get(container) if isinstance(container, fx.Node) else None
                keys[node] += (key, str(map_arg(index, lambda _: None)))
            by_key.setdefault(keys[node], []).append(node)
        return cls(keys, by_key)

    def like(self, other: _Numbered, node: fx.Node) -> fx.Node:
        """The node that is here what `node` is in the other graph."""
        key = other.keys[node]
        theirs, ours = other.by_key[key], self.by_key.get(key, [])
        # Where the whole model was traced, a module that is used twice was traced twice.
        if not ours or len(theirs) % len(ours):
            raise _Elsewhere(f"{node.name} is computed {len(ours)} times there, not {len(theirs)}")
        return ours[theirs.index(node) % len(ours)]


__all__ = ["Site", "check_closed", "locate"]
