"""A CUDA graph as it is replayed: how long its kernels take there, node by node.

The profiler shows a replay as the kernels of one launch, and says nothing of nodes. A walk through the graph launches
the same kernels in the same order, one by one, and knows for which node each one is: side by side, their names tell
whose the replay's are. Source: Kineto gives every kernel of a replay the correlation id of its `cudaGraphLaunch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx

from burnish.report.kernels import Event, Launch, Launches, added_us, host_calls, mean_us, on_device, traced
from burnish.report.timing import fastest

_CALLS = 9
_GRAPH_LAUNCH = "GraphLaunch"


@dataclass(frozen=True)
class Replayed:
    """What ran for each node in one of the quickest replays, and each node's time, a mean over these.

    told_apart: False where the kernels are the walk's, and their times the walk's as shares of a replay's.
    """

    launches: Launches
    us: Mapping[fx.Node, float]
    told_apart: bool = True


def replayed(call: Callable[[], Any], walked: Launches, walked_us: Mapping[fx.Node, float]) -> Replayed:
    """The CUDA graph that `call` replays; `walked` is what a walk through its nodes launched, and what that took."""

    def calls() -> None:
        for _ in range(_CALLS):
            call()
            torch.cuda.synchronize()

    return told_apart(replays_of(traced(calls)), walked, walked_us)


def replays_of(events: Iterable[Event]) -> list[list[Launch]]:
    """The kernels, copies and fills of each replay in a trace, in the order in which they began."""
    complete = [event for event in events if event.get("ph") == "X"]
    replays: dict[int, list[Launch]] = {
        event["args"]["correlation"]: [] for event in host_calls(complete) if _GRAPH_LAUNCH in event["name"]
    }
    for correlation, launch in on_device(complete):
        if correlation in replays:
            replays[correlation].append(launch)
    return [replay for replay in replays.values() if replay]


def told_apart(replays: Sequence[Sequence[Launch]], walked: Launches, walked_us: Mapping[fx.Node, float]) -> Replayed:
    """Each node's part of the replays. Where one of their kernels is not among the walk's, the walk's times, in the
    proportion in which the replays are quicker."""
    nodes_of = [(replay, _nodes_of(replay, walked)) for replay in replays]
    known: list[Launches] = []
    for replay, nodes in nodes_of:
        if nodes is not None:
            launches: Launches = {node: [] for node in walked_us}
            for node, launch in zip(nodes, replay, strict=True):
                launches[node].append(launch)
            known.append(launches)
    if known:
        quick = fastest(known, lambda each: sum(map(added_us, each.values())))
        return Replayed(quick[0], mean_us(quick))
    total = sum(walked_us.values())
    if not replays or not total:
        return Replayed(walked, walked_us, told_apart=False)
    quickest = fastest(replays, added_us)
    share = sum(map(added_us, quickest)) / len(quickest) / total
    return Replayed(walked, {node: us * share for node, us in walked_us.items()}, told_apart=False)


def _nodes_of(replay: Sequence[Launch], walked: Launches) -> list[fx.Node] | None:
    """The node of each kernel; None where the walk did not launch all of them, in this order."""
    launched = sorted(
        ((launch, node) for node, launches in walked.items() for launch in launches), key=lambda pair: pair[0].start_us
    )
    nodes = [node for _, node in launched]
    names, known = [_name(launch) for launch in replay], [_name(launch) for launch, _ in launched]
    if names == known:
        return nodes
    # The walk's may be more: what is done once for all calls, when the graph is captured.
    blocks = SequenceMatcher(None, names, known, autojunk=False).get_matching_blocks()
    found = [nodes[block.b + i] for block in blocks for i in range(block.size)]
    return found if len(found) == len(names) else None


def _name(launch: Launch) -> str:
    """A copy's and a fill's without the kind of memory, which is not always known in a graph: "Memset (Device)"."""
    return launch.name.partition(" ")[0] if launch.name.startswith("Mem") else launch.name
