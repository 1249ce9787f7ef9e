"""How long a model takes and each node of its graph, by turns, so that both meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from burnish.report.walk import Walk

_FEWEST, _MOST = 3, 30  # rounds


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, and on the CPU of each node in a walk through the graph (on CUDA the profiler tells).

    Both are means over the third of the rounds that took least: what else the machine does can only add. Whole rounds
    are chosen, not each node's best ones, so that the nodes' times add up to one walk's. median_us: of all `calls`.
    """

    end_to_end_us: float
    median_us: float
    node_us: dict[fx.Node, float]
    calls: int


def take_times(walk: Walk, leaves: Sequence[Any], call: Callable[[], Any], *, cuda: bool, seconds: float) -> Times:
    """Times `call` and `walk(leaves)` in turns for about so many seconds, at least three rounds. Warm up before."""
    calls: list[float] = []
    walks: list[dict[fx.Node, float]] = []
    ends = time.perf_counter() + seconds
    while len(calls) < _FEWEST or (time.perf_counter() < ends and len(calls) < _MOST):
        calls.append(_call_us(call, cuda))
        if not cuda:
            walks.append(_walk_us(walk, leaves))
    quick = fastest(walks, lambda nodes: sum(nodes.values()))
    node_us = {node: statistics.fmean(nodes[node] for nodes in quick) for node in quick[0]} if quick else {}
    return Times(statistics.fmean(fastest(calls, float)), statistics.median(calls), node_us, len(calls))


def in_turns(calls: Sequence[Callable[[], Any]], *, cuda: bool, seconds: float) -> list[float]:
    """Microseconds of each call, timed in turns for about so many seconds, at least three rounds: means over the third
    of its own that took least."""
    times: list[list[float]] = [[] for _ in calls]
    ends = time.perf_counter() + seconds
    while len(times[0]) < _FEWEST or (time.perf_counter() < ends and len(times[0]) < _MOST):
        for call, own in zip(calls, times, strict=True):
            own.append(_call_us(call, cuda))
    return [statistics.fmean(fastest(own, float)) for own in times]


def fastest(rounds: Sequence[Any], us: Callable[[Any], float]) -> list[Any]:
    """The third of the rounds that took least."""
    return sorted(rounds, key=us)[: -(-len(rounds) // 3)]


def _call_us(call: Callable[[], Any], cuda: bool) -> float:
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e6


def _walk_us(walk: Walk, leaves: Sequence[Any]) -> dict[fx.Node, float]:
    """Of each node with the release of what it was the last to read: memory is given back to the system in between."""
    started: dict[fx.Node, float] = {}
    times: dict[fx.Node, float] = {}

    def visit(node: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        started[node] = time.perf_counter()
        return function(*args, **kwargs)

    def done(node: fx.Node) -> None:
        if node in started:
            times[node] = (time.perf_counter() - started[node]) * 1e6

    walk(leaves, visit, done)
    return times
