"""`burnish graph --why`: where a rewrite matched in a model, where it almost did, and what differed there."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from burnish.capture import Program
from burnish.graph.matcher import Matches, find_matches
from burnish.record import unnumbered
from burnish.report.where import path_of, source_of
from burnish.rewrites import FUSE, RAISE, GraphPass, Rewrite, apply
from burnish.rewrites.rewrite import Outcome, floating_dtypes, names_of_sizes, renamed

_STEPS = {"raise": RAISE, "fuse": FUSE}
_TOLD = 8  # places that are listed for a rewrite


@dataclass(frozen=True)
class Place:
    """A place where a rewrite matched, or why it did not.

    node: the first that differed, or at which a match begins; None where nothing of it is in the graph. module, source:
    where in the model that is. matched: so many nodes of the pattern agreed. reason: empty where it matched.
    """

    node: str | None
    module: str = ""
    source: str = ""
    matched: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Attempt:
    """What a rewrite finds in the graph as it is when its turn comes.

    size: how many nodes its pattern has; None for a pass, which has no pattern. count: how often it matched.
    """

    rewrite: str
    step: str
    size: int | None
    count: int
    matches: tuple[Place, ...] = ()
    misses: tuple[Place, ...] = ()


def find_rewrites(name: str) -> list[Rewrite | GraphPass]:
    """The rewrite called so, or all of the family (what stands before the colon). ValueError that lists them."""
    every = [rewrite for rewrites in _STEPS.values() for rewrite in rewrites]
    found = [rewrite for rewrite in every if rewrite.name == name]
    found = found or [rewrite for rewrite in every if _family(rewrite) == name]
    if not found:
        families = ", ".join(dict.fromkeys(map(_family, every)))
        raise ValueError(f"--why {name}: there is no such rewrite; there are: {families}")
    return found


def attempts(program: Program, rewrites: Sequence[Rewrite | GraphPass]) -> list[Attempt]:
    """Raises and fuses the captured `program`, looking at the graph before each of `rewrites`."""
    found: list[Attempt] = []

    def looking(step: str, every: Iterable[Rewrite | GraphPass]) -> Iterator[Rewrite | GraphPass]:
        for rewrite in every:
            if rewrite in rewrites:
                yield GraphPass("look", _look(step, rewrite, found))
            yield rewrite

    for step, every in _STEPS.items():
        program.history.append(apply(step, looking(step, every), program.graph_module))
    sizes = names_of_sizes(program.graph_module.graph)

    def named(miss: Place) -> Place:
        return replace(miss, reason=renamed(miss.reason, sizes.get))

    return [replace(attempt, misses=tuple(map(named, attempt.misses))) for attempt in found]


def _look(step: str, rewrite: Rewrite | GraphPass, found: list[Attempt]) -> Any:
    def look(graph_module: fx.GraphModule) -> Outcome:
        attempt = _of_pass if isinstance(rewrite, GraphPass) else _of_rewrite
        found.append(attempt(step, rewrite, graph_module))  # type: ignore[arg-type]
        return Outcome(0)

    return look


def _of_pass(step: str, rewrite: GraphPass, graph_module: fx.GraphModule) -> Attempt:
    outcome = rewrite.run(fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph)))
    nodes = {node.name: node for node in graph_module.graph.nodes}
    misses = []
    for refused in outcome.refused:
        name, _, reason = refused.partition(": ")
        misses.append(_place(nodes.get(name), refused if name not in nodes else reason))
    return Attempt(rewrite.name, step, None, outcome.count, misses=tuple(misses))


def _of_rewrite(step: str, rewrite: Rewrite, graph_module: fx.GraphModule) -> Attempt:
    anchors = rewrite.anchor if isinstance(rewrite.anchor, tuple) else (rewrite.anchor,)
    targets = {node.target for node in graph_module.graph.nodes}
    if absent := [str(anchor).removesuffix(".default") for anchor in anchors if anchor not in targets]:
        return Attempt(
            rewrite.name, step, None, 0, misses=(Place(None, reason=f"there is no {' and no '.join(absent)}"),)
        )
    dtypes = floating_dtypes(graph_module.graph)
    tries: list[Matches] = []
    size = 0
    for dtype in dtypes if rewrite.examples else dtypes[:1]:
        pattern = rewrite.prepared(dtype)
        size = len(pattern.nodes)
        tries.append(find_matches(graph_module, pattern, guard=rewrite.guard))
    # A pattern is traced for each dtype of the model: the one that came furthest is the one meant.
    best = max(tries, key=lambda found: (len(found), found.near_misses[0].matched if found.near_misses else 0))
    near = best.near_misses[0].matched if best.near_misses else 0
    refused = {match.anchor: reason for match, reason in best.refused}  # one of a place's, which are the same in turns
    misses = [_place(node, _without_name(node, reason), size) for node, reason in refused.items()]
    misses += [
        _place(miss.node, _without_name(miss.node, miss.reason), miss.matched)
        for miss in best.near_misses
        if miss.matched < size and (miss.matched == near or 2 * miss.matched >= size)
    ]
    matches = tuple(_place(match.anchor, "", size) for match in best)
    return Attempt(rewrite.name, step, size, len(best), matches, tuple(misses) if near > 1 or not best else ())


def _place(node: fx.Node | None, reason: str, matched: int | None = None) -> Place:
    if node is None:
        return Place(None, matched=matched, reason=reason)
    return Place(node.name, path_of(node), source_of(node).place, matched, reason)


def _without_name(node: fx.Node | None, reason: str) -> str:
    return reason.removeprefix(f"{node.name}: ") if node is not None else reason


def _family(rewrite: Rewrite | GraphPass) -> str:
    return rewrite.name.partition(":")[0]


# --- for people -------------------------------------------------------------------------------------------------------


def described(found: Sequence[Attempt]) -> list[str]:
    """Lines of text: each rewrite, where it matched, and where it almost did; what has no part in the graph last."""
    lines: list[str] = []
    absent: dict[str, list[str]] = {}
    for attempt in found:
        if not attempt.count and all(miss.node is None for miss in attempt.misses):
            reason = attempt.misses[0].reason if attempt.misses else "there is no place for it"
            absent.setdefault(reason, []).append(attempt.rewrite)
            continue
        times = f"{attempt.count} match{'' if attempt.count == 1 else 'es'}"
        lines.append(f"{attempt.rewrite} ({attempt.step}): {times}")
        lines += [f"  matched at {where}" for where in _grouped(attempt.matches, attempt.size)]
        lines += [f"  not at {where}" for where in _grouped(attempt.misses, attempt.size)]
    return lines + [f"{_listed(names)}: 0 matches, {reason} in the graph by then" for reason, names in absent.items()]


def _listed(names: Sequence[str]) -> str:
    """ "a: b; c; d: e" for a: b, a: c and d: e."""
    families: dict[str, list[str]] = {}
    for name in names:
        family, colon, rest = name.partition(": ")
        families.setdefault(family + colon, []).append(rest)
    return "; ".join(family + "; ".join(rest) for family, rest in families.items())


def _grouped(places: Sequence[Place], size: int | None) -> Iterator[str]:
    """A line for each reason; of places that matched one for all that differ in numbers only, as equal layers do."""
    groups: dict[tuple[int | None, str], list[Place]] = {}
    for place in places:
        alike = unnumbered(place.reason) or re.sub(r"\d+", "#", f"{place.node} {place.module}")
        groups.setdefault((place.matched, alike), []).append(place)
    for place, *others in list(groups.values())[:_TOLD]:
        where = ", ".join(filter(None, [place.module, place.source]))
        line = f"{place.node}" + (f" ({where})" if where else "")
        if others:
            line += f" and at {len(others)} place{'' if len(others) == 1 else 's'} more"
        if place.reason and place.matched == size and size is not None:
            yield f"{line}: all {size} nodes agree, but {place.reason.removeprefix('guard: ')}"
        elif place.reason and size is not None:
            what = "it " if place.reason.startswith("is ") else ""
            yield f"{line}: {place.matched} of {size} nodes agree, but {what}{place.reason}"
        else:
            yield f"{line}: {place.reason}" if place.reason else line
    if len(groups) > _TOLD:
        yield f"{len(groups) - _TOLD} more"
