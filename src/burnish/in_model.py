"""Impls chosen inside the whole model: on a GPU a kernel's time depends on its neighbours.

Alone in a chain of itself a kernel overlaps with its like, finds its instructions in the cache, and shares no
multiprocessor with another. So the best few of each signature are tried where they will run: in a CUDA graph of the
model.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from burnish.choose import Chosen, Seen
from burnish.lower import Slot
from burnish.measure import replay_us
from burnish.parallel.agreement import Agreement
from burnish.prepare import Prepared
from burnish.runtime.cuda_graph import GraphMemory
from burnish.runtime.module import Call
from burnish.tuning import Key, Tuner

Functions = Mapping[str, Callable[..., Any]]
Contest = Callable[[Functions, Functions], tuple[float, float]]
"""Microseconds of the model with the champion's functions in its slots, and with a rival's."""

_NOISE = 0.005  # of a model's time
_BUDGET_SECONDS = 6.0
_ROUNDS, _ENOUGH_US = 3, 20_000.0  # of replays in turn, and for how long each of the two in all


def choose_in_model(prepared: Prepared, chosen: Chosen, seen: Seen, tuner: Tuner, contest: Contest) -> None:
    """Puts other Impls into `chosen` where the model is faster with them by `contest`, and remembers what was found.

    Only signatures that were measured just now have their turn, those that take most of the time first. A gain within
    the model's noise counts for nothing, nor does one of more than the kernels take altogether. So those that take no
    more than the noise have no turn.
    """
    groups: dict[Key, list[Slot]] = {}
    for slot in prepared.executable.slots:
        choice = chosen.choices[slot.name]
        if choice.source == "measured" and not choice.in_model_us:
            groups.setdefault(seen.keys[slot.name], []).append(slot)

    def total_us(slots: list[Slot]) -> float:
        choice = chosen.choices[slots[0].name]
        return len(slots) * choice.times_us.get(choice.candidate, 0.0)

    ends, noise_us = time.perf_counter() + _BUDGET_SECONDS, 0.0

    def is_over() -> bool:
        return tuner.agreement.first(time.perf_counter() > ends)

    for key, slots in sorted(groups.items(), key=lambda group: -total_us(group[1])):
        most_us = total_us(slots)
        if most_us <= noise_us:
            return
        op, args, winner = slots[0].op, seen.arguments[key][0], chosen.choices[slots[0].name]
        rivals = tuner.rivals(op, args, winner, slots[0].in_place, seen.live_rows[key])
        if not rivals or is_over():
            continue
        tried: dict[str, float] = {}
        for function, rival in rivals:
            if tried and is_over():
                break
            functions = {**chosen.functions, **dict.fromkeys((slot.name for slot in slots), function)}
            champion_us, rival_us = contest(chosen.functions, functions)
            if math.isinf(champion_us):  # the model cannot be captured: there will be no graph to be fast in
                return
            tried[winner.candidate], tried[rival.candidate] = round(champion_us, 2), round(rival_us, 2)
            noise_us = _NOISE * champion_us
            if noise_us < champion_us - rival_us < most_us:
                winner = rival
                chosen.functions.update(functions)
        winner = replace(winner, in_model_us={winner.candidate: tried[winner.candidate], **tried})
        chosen.choices.update(dict.fromkeys((slot.name for slot in slots), winner))
        tuner.settle(key, winner)


class ModelContest:
    """Microseconds that CUDA graphs of `prepared` take on one call with the champion's functions in its slots and with
    a rival's, replayed in turn: a warm device is slower, and so both have to be (Llama 1B, 2048 tokens, H200: 6855 to
    7500 us for one and the same graph within a minute). Infinity for what cannot be captured."""

    def __init__(self, prepared: Prepared, model: nn.Module, call: Call, agreement: Agreement | None = None) -> None:
        self._prepared, self._model, self._call = prepared, model, call
        self._agreement = agreement or Agreement()
        # The last two, of whom one goes on to the next contest.
        self._last: list[tuple[Functions, torch.cuda.CUDAGraph | None]] = []
        self._memory = GraphMemory()

    def __call__(self, champion: Functions, rival: Functions) -> tuple[float, float]:
        known = next((graph for functions, graph in self._last if functions == champion), None)
        mine, other = known or self._graph(champion), self._graph(rival)
        self._last = [(dict(champion), mine), (dict(rival), other)]
        if mine is None:
            return math.inf, math.inf
        mine.replay()
        replays = self._agreement.first(math.ceil(_ENOUGH_US / _ROUNDS / replay_us(mine, 1)))
        if other is None:
            return self._agreement.first(replay_us(mine, replays)), math.inf
        other.replay()
        rounds = [(replay_us(mine, replays), replay_us(other, replays)) for _ in range(_ROUNDS)]
        medians = [statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)]
        champion_us, rival_us = self._agreement.first(medians)
        return champion_us, rival_us

    def _graph(self, functions: Functions) -> torch.cuda.CUDAGraph | None:
        entry = self._prepared.bind(functions, self._model)
        graph = None
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            entry.run(self._call.leaves)  # compiles and loads what a capture must not
            torch.cuda.synchronize()
            graph = self._memory.capture(lambda: entry.run(self._call.leaves))[0]
        return graph if self._agreement.all(graph is not None) else None
