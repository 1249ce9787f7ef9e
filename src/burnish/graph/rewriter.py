"""Replace every occurrence of a pattern by what a Python function computes: all of them, or nothing changes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from burnish.graph.effects import is_pure
from burnish.graph.matcher import Guard, Match, Matches, Pattern, PatternLike, find_matches
from burnish.graph.record import Replacement
from burnish.graph.recording import Recording

__all__ = ["erase", "replace_matches", "replace_pattern"]


def replace_pattern(
    gm: fx.GraphModule,
    pattern: PatternLike,
    replacement: Callable[..., Any] | nn.Module,
    *,
    guard: Guard | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> Matches:
    """Replace every match of `pattern` in `gm` by `replacement`, in place, and recompile.

    `replacement` is called once per match. Its parameters are bound by name: each must be a parameter of the pattern,
    or a weight of a pattern module, or have a default; `match` as a keyword-only parameter receives the Match. Nodes
    arrive as proxies, which know shape and dtype where the graph does; constants arrive as they are, so that the
    function may branch on `bias is None`. It returns as many values as the pattern, and may return an input. Submodules
    and weights of a replacement module that are named like the pattern's are the model's; others are added to it.

    A replacement that fails leaves graph and modules as they were, and its error is raised.

    Returns the matches as they were found. None is not an error: `.near_misses` says why.
    """
    prepared = Pattern.of(pattern, example_inputs)
    plan = Replacement.of(replacement, prepared)  # a wrong signature is an error even where nothing matches
    matches = find_matches(gm, prepared, guard=guard)
    replace_matches(gm, matches, plan)
    return matches


def replace_matches(gm: fx.GraphModule, matches: Matches, replacement: Replacement) -> None:
    """Rewrite matches that `find_matches` found in the unchanged `gm`."""
    if not matches:
        return
    recordings = replacement.record(gm, matches)
    replaced: dict[fx.Node, fx.Node] = {}
    for match, recording in zip(matches, recordings, strict=True):
        _insert(gm, match, recording, replaced)
    _restore_order(gm.graph)
    gm.graph.lint()
    gm.recompile()


def _insert(gm: fx.GraphModule, match: Match, recording: Recording, replaced: dict[fx.Node, fx.Node]) -> None:
    recording.install(gm)
    # An input of this match may have been the output of a match before it.
    image = {scratch: _current(node, replaced) for scratch, node in recording.inputs.items()}
    kept: set[fx.Node] = set()
    created: set[fx.Node] = set()
    last = match.nodes[-1]
    for scratch in recording.nodes:
        call: Any = map_arg((scratch.args, scratch.kwargs), image.__getitem__)
        args, kwargs = call
        target = recording.targets.get(scratch, scratch.target)
        same = _same_node(match, kept, (scratch.op, target, args, kwargs))
        if same is not None:
            kept.add(same)
            image[scratch] = same
            continue
        with gm.graph.inserting_after(last):
            last = gm.graph.create_node(scratch.op, target, args, kwargs, name=scratch.name)
        last.meta.update(scratch.meta)
        image[scratch] = last
        created.add(last)
    for old, result in zip(match.outputs, recording.outputs, strict=True):
        new = image[result]
        if new is old:
            continue
        if new in created:
            _inherit(new, old)
        # A kept node that is no longer the result may be what the new nodes are computed from.
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in created)
        replaced[old] = new
    erase(gm, (node for node in reversed(match.nodes) if node not in kept))


def _current(node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in replaced:
        node = replaced[node]
    return node


def _same_node(match: Match, kept: set[fx.Node], call: tuple[Any, ...]) -> fx.Node | None:
    """The matched node that the replacement repeats as it is: it stays, untouched."""
    for node in match.nodes:
        if (
            node not in kept
            and (node.op, node.target) == call[:2]
            and _same_arguments((node.args, node.kwargs), call[2:])
        ):
            return node
    return None


def _same_arguments(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same_arguments, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_arguments(a[k], b[k]) for k in a)
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return type(a) is type(b) and bool(a == b)


def _inherit(new: fx.Node, old: fx.Node) -> None:
    """Let the result's node stand where the old one stood; its own value counts where it is known."""
    new.meta.update({k: v for k, v in old.meta.items() if k != "val" or k not in new.meta})


def erase(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Erase nodes, given users first, and then what only they needed: pure nodes that are left without users."""
    pending: list[fx.Node] = []
    for node in nodes:
        pending += node.all_input_nodes
        gm.graph.erase_node(node)
    while pending:
        node = pending.pop()
        if not node.users and not node._erased and is_pure(node, gm):
            pending += node.all_input_nodes
            gm.graph.erase_node(node)


def _restore_order(graph: fx.Graph) -> None:
    """Put definitions before uses again, moving as little as possible (several results of one match may need it)."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    if all(position[source] < position[node] for node in position for source in node.all_input_nodes):
        return
    waiting = {node: len(node.all_input_nodes) for node in position}
    ready = [position[node] for node, count in waiting.items() if count == 0]
    nodes = list(position)
    heapq.heapify(ready)
    last = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, position[user])
