"""How long a call takes: on the CPU by turns, on CUDA inside a captured graph on weights that are not in the cache."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.runtime.cuda_graph import GraphMemory

ENOUGH_US = 30_000.0  # per function: beyond this one more sample says nothing that the cache could keep
FEWEST_SAMPLES = 4
_SAMPLES = 15

_COLD_BYTES = 160 << 20  # of weights in turn: more than twice the 60 MB of an H200's L2 cache
_CHAIN = (8, 48)  # calls in one graph, at least and at most
_REPLAYS, _LONG_US = 5, 20_000.0  # so many are timed, fewer if they would take longer
_NEAR, _FINALISTS = 1.1, 3  # of those within 10% of the fastest, so many are measured again,
_FINAL_ROUNDS, _FINAL_US = 3, 4_000.0  # in so many rounds, for as long in each


def measure(
    functions: dict[str, Callable[..., Any]], arguments: Sequence[Sequence[Any]], *, budget_us: float
) -> dict[str, float]:
    """Microseconds per call of each function, in interleaved rounds that walk through `arguments`: the mean of the
    fastest third of the samples. What else the machine does can only make a sample slower, on a shared one by a lot."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    running = dict(functions)
    places = {name: place for place, name in enumerate(functions)}
    with torch.no_grad():
        for function in functions.values():  # the first call pays for primitives and pages
            _timed(function, arguments[0])
        started = time.perf_counter()
        for sample in range(_SAMPLES):
            for name, function in list(running.items()):
                # Each function is ahead of the one before it: who reads a weight second would find it in the cache.
                turn = sample + places[name] * max(1, len(arguments) // len(functions))
                times[name].append(_timed(function, arguments[turn % len(arguments)]))
                if sum(times[name]) > ENOUGH_US:
                    del running[name]
            spent_us = (time.perf_counter() - started) * 1e6
            if not running or (spent_us > budget_us and sample + 1 >= FEWEST_SAMPLES):
                break
            best = min(map(_typical, times.values()))
            running = {name: f for name, f in running.items() if _typical(times[name]) < 2 * best}
    return {name: round(_typical(samples), 2) for name, samples in times.items()}


def measure_in_step(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds per call of each function, as `measure` finds them, but with no clock deciding how often they run:
    on several ranks whose collectives wait for each other, they have to run equally often."""
    with torch.no_grad():
        for function in functions.values():
            _timed(function, ())
        rounds = [{name: _timed(function, ()) for name, function in functions.items()} for _ in range(FEWEST_SAMPLES)]
    return {name: round(_typical([taken[name] for taken in rounds]), 2) for name in functions}


def _typical(samples: Sequence[float]) -> float:
    return statistics.fmean(sorted(samples)[: max(1, len(samples) // 3)])


def _timed(function: Callable[..., Any], args: Sequence[Any]) -> float:
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function(*args)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e6


def measure_captured(
    functions: dict[str, Callable[..., Any]], arguments: Sequence[Sequence[Any]], weights: Sequence[int]
) -> dict[str, float]:
    """Microseconds per call of each function, in a CUDA graph that calls it many times in a row; infinity for one that
    cannot be captured.

    As in a model: activations, at the positions not in `weights`, come from where the kernel before left them; weights
    come from memory, because the graph walks through more copies of them than the L2 cache holds.
    The fastest few are measured again in turn: what ran before decides how warm the device is, and so its clock.
    """
    arguments = _cold(arguments, weights)
    memory = GraphMemory()  # one for all: what each graph had of its own would stay reserved after it
    times: dict[str, float] = {}
    finalists: dict[str, torch.cuda.CUDAGraph] = {}
    for name, function in functions.items():
        try:
            graph = finalists[name] = _chain(function, arguments, memory)
            enough = math.ceil(_LONG_US / replay_us(graph, 1))
            times[name] = replay_us(graph, min(enough, _REPLAYS)) / len(arguments)
        except RuntimeError:  # it cannot run here, or cannot be captured
            times[name] = math.inf
            torch.cuda.synchronize()
        near = sorted((n for n in finalists if times[n] <= _NEAR * min(times.values())), key=times.__getitem__)
        finalists = {n: finalists[n] for n in near[:_FINALISTS]}
    if len(finalists) > 1:
        replays = {n: max(1, math.ceil(_FINAL_US / (times[n] * len(arguments)))) for n in finalists}
        rounds = [{n: replay_us(graph, replays[n]) for n, graph in finalists.items()} for _ in range(_FINAL_ROUNDS)]
        for name in finalists:
            times[name] = statistics.median(taken[name] for taken in rounds) / len(arguments)
    return {name: round(us, 3) for name, us in times.items()}


def measure_captured_in_step(
    functions: dict[str, Callable[..., Any]], arguments: Sequence[Any], everywhere: Callable[[bool], bool]
) -> dict[str, float]:
    """Microseconds per call of each function, as `measure_captured` finds them, of functions that exchange something
    with other ranks: no clock decides how often they run, and in turn they run from the start.

    `everywhere` says whether something is so on all ranks; a function that one of them cannot capture runs on none.
    """
    memory = GraphMemory()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, function in functions.items():
        graph = None
        with contextlib.suppress(RuntimeError):
            graph = _chain(function, [arguments] * _CHAIN[1], memory)
        torch.cuda.synchronize()
        if everywhere(graph is not None) and graph is not None:
            graphs[name] = graph
            replay_us(graph, 1)
    rounds = [{name: replay_us(graph, _REPLAYS) for name, graph in graphs.items()} for _ in range(_FINAL_ROUNDS)]
    times = dict.fromkeys(functions, math.inf)
    for name in graphs:
        times[name] = round(statistics.median(taken[name] for taken in rounds) / _CHAIN[1], 3)
    return times


def _chain(
    function: Callable[..., Any], arguments: Sequence[Sequence[Any]], memory: GraphMemory
) -> torch.cuda.CUDAGraph:
    def chain() -> None:
        for args in arguments:
            function(*args)

    with torch.no_grad():
        function(*arguments[0])  # compiles, and sets libraries up
        torch.cuda.synchronize()
        graph, _ = memory.capture(chain)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds of one replay, the median of so many."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) * 1e3


def _cold(arguments: Sequence[Sequence[Any]], weights: Sequence[int]) -> list[Sequence[Any]]:
    """The argument lists, with copies of the weights added until all of them together exceed the L2 cache."""
    size = sum(arguments[0][i].nbytes for i in weights if isinstance(arguments[0][i], Tensor))
    fewest, most = _CHAIN
    wanted = min(most, max(fewest, -(-_COLD_BYTES // max(1, size)))) if size else fewest
    cold = list(arguments[:wanted])
    while len(cold) < wanted:
        args = list(arguments[len(cold) % len(arguments)])
        for i in weights:
            if isinstance(args[i], Tensor):
                args[i] = args[i].clone()
        cold.append(args)
    return cold
