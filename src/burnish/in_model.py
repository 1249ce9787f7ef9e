"""Impls chosen inside the whole model: on a GPU a kernel's time depends on its neighbours.

Alone in a chain of itself a kernel overlaps with its like, finds its instructions in the cache, and shares no
multiprocessor with another. So the best few of each signature are tried where they will run: in a CUDA graph of the
model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from burnish.choose import Chosen, Seen
from burnish.lower import Slot
from burnish.measure import replay_us
from burnish.prepare import Prepared
from burnish.runtime.cuda_graph import GraphMemory
from burnish.runtime.module import Call
from burnish.tuning import Key, Tuner

Functions = Mapping[str, Callable[..., Any]]

_BETTER = 0.995  # less is noise
_BUDGET_SECONDS = 6.0
_REPLAYS, _ENOUGH_US = 9, 20_000.0


def choose_in_model(
    prepared: Prepared, chosen: Chosen, seen: Seen, tuner: Tuner, time_us: Callable[[Functions], float]
) -> None:
    """Puts other Impls into `chosen` where the model is faster with them by `time_us`, and remembers what was found.

    Only signatures that were measured just now have their turn, those that take most of the time first.
    """
    groups: dict[Key, list[Slot]] = {}
    for slot in prepared.executable.slots:
        choice = chosen.choices[slot.name]
        if choice.source == "measured" and not choice.in_model_us:
            groups.setdefault(seen.keys[slot.name], []).append(slot)

    def total_us(slots: list[Slot]) -> float:
        choice = chosen.choices[slots[0].name]
        return len(slots) * choice.times_us.get(choice.candidate, 0.0)

    ends = time.perf_counter() + _BUDGET_SECONDS
    best = None
    for key, slots in sorted(groups.items(), key=lambda group: -total_us(group[1])):
        op, args, winner = slots[0].op, seen.arguments[key][0], chosen.choices[slots[0].name]
        rivals = tuner.rivals(op, args, winner)
        if not rivals or time.perf_counter() > ends:
            continue
        best = time_us(chosen.functions) if best is None else best
        if math.isinf(best):  # the model cannot be captured: there will be no graph to be fast in
            return
        tried = {winner.candidate: round(best, 2)}
        for function, rival in rivals:
            us = time_us({**chosen.functions, **dict.fromkeys((slot.name for slot in slots), function)})
            tried[rival.candidate] = round(us, 2)
            if us < _BETTER * best:
                best, winner = us, rival
                chosen.functions.update(dict.fromkeys((slot.name for slot in slots), function))
        winner = replace(winner, in_model_us={winner.candidate: tried[winner.candidate], **tried})
        chosen.choices.update(dict.fromkeys((slot.name for slot in slots), winner))
        tuner.settle(op, args, winner)


def model_timer(prepared: Prepared, model: nn.Module, call: Call) -> Callable[[Functions], float]:
    """Microseconds that a CUDA graph of `prepared` takes on this call with given functions in its slots; infinity where
    they cannot be captured."""

    memory = GraphMemory()  # the graphs', one after the other

    def time_us(functions: Functions) -> float:
        entry = prepared.bind(functions, model)
        with torch.no_grad():
            try:
                entry.run(call.leaves)
                torch.cuda.synchronize()
                graph, _ = memory.capture(lambda: entry.run(call.leaves))
            except RuntimeError:
                return float("inf")
        graph.replay()
        first = replay_us(graph, 1)
        return replay_us(graph, max(_REPLAYS, math.ceil(_ENOUGH_US / first)))

    return time_us
