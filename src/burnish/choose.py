"""Which Impl stands in which slot: measured on the first call's activations, looked up for a new size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.lower import Executable, Slot
from burnish.prepare import Prepared
from burnish.runtime.module import Call
from burnish.tuning import Choice, Key, Tuner, key_of


class Seen:
    """One run of the code with each Op's first able Impl, or the reference where verification rejected the Impls.

    Attributes:
        keys: the signature of each slot's call, by slot name.
        arguments: of each signature the arguments of its calls, all with the first one's activations.
        live_rows: of each signature how many rows its calls want, where they are told.
    """

    def __init__(self, prepared: Prepared, call: Call) -> None:
        self.keys: dict[str, Key] = {}
        self.arguments: dict[Key, list[tuple[Any, ...]]] = {}
        self.live_rows: dict[Key, Tensor | None] = {}
        weights = set(map(id, prepared.executable.read_weights()))

        def recording(slot: Slot) -> Callable[..., Any]:
            def record(*args: Any, live_rows: Tensor | None = None) -> Any:
                key = self.keys[slot.name] = key_of(slot.op, args, live_rows=live_rows)
                self.live_rows[key] = live_rows
                instances = self.arguments.setdefault(key, [])
                # Other layers' weights on the first layer's activations: little is kept, and weights come from memory.
                instances.append(args if not instances else _with_activations_of(instances[0], args, weights))
                return slot.op.reference(*args) if slot.name in prepared.rejected else slot.op.select(*args).fn(*args)

            return record

        # cuDNN would plan anew for each size: 70 ms of BERT-base's first call at a new one, up to 1.3 s.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            _run(prepared.executable, recording, call)

    def compile(self, chosen: Chosen) -> None:
        """Compiles the chosen Impls' kernels all at once; one after the other, at their first calls, takes seconds."""
        calls = {self.keys[name]: chosen.functions[name] for name, c in chosen.choices.items() if c.config is not None}
        if calls:
            from burnish.kernels.warm_up import warm_up

            warm_up(partial(function, *self.arguments[key][0], **self.told(key)) for key, function in calls.items())

    def told(self, key: Key) -> dict[str, Tensor]:
        """The keyword that calls of this signature have."""
        return _told(self.live_rows[key])


@dataclass
class Chosen:
    """A callable and the Choice behind it for each slot, by slot name; `outputs` if the model was run with them
    (flat)."""

    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    outputs: Sequence[Any] | None = None

    def reject(self, slot: Slot) -> None:
        """Puts the Op's reference where an Impl failed verification."""
        self.functions[slot.name] = slot if slot.is_told else slot.op.reference
        self.choices[slot.name] = Choice("reference", source="verified")


def choose_by_measuring(prepared: Prepared, call: Call, tuner: Tuner) -> tuple[Chosen, Seen]:
    """Runs once, keeping one set of activations for each distinct signature, and measures the Impls on them."""
    seen, chosen = Seen(prepared, call), Chosen()
    for slot in prepared.executable.slots:
        key = seen.keys[slot.name]
        args, *others = seen.arguments[key]
        chosen.functions[slot.name], chosen.choices[slot.name] = tuner.choose(
            slot.op,
            args,
            budget_us=tuner.FIRST_BUDGET_US,
            thorough=True,
            variants=others,
            in_place=slot.in_place,
            live_rows=seen.live_rows[key],
        )
    seen.compile(chosen)
    return chosen, seen


def choose_for_new_size(prepared: Prepared, call: Call, tuner: Tuner) -> Chosen:
    """Runs once and chooses each Impl: remembered or nearby, with a small budget for the unknown."""
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in call.leaves):
        return _choose_on_cuda(prepared, call, tuner)
    return _choose_on_the_way(prepared, call, tuner)


def _choose_on_cuda(prepared: Prepared, call: Call, tuner: Tuner) -> Chosen:
    """After a run with Impls that need no compiler, so that all kernels of the choices can be compiled at once."""
    seen = Seen(prepared, call)
    chosen = Chosen()
    ends = time.perf_counter() + tuner.NEW_SIZE_BUDGET_US / 1e6
    for slot in prepared.executable.slots:
        if slot.name in prepared.rejected:
            chosen.reject(slot)
        else:
            key = seen.keys[slot.name]
            left_us = max(0.0, (ends - time.perf_counter()) * 1e6)
            chosen.functions[slot.name], chosen.choices[slot.name] = tuner.choose(
                slot.op,
                seen.arguments[key][0],
                budget_us=left_us,
                in_place=slot.in_place,
                live_rows=seen.live_rows[key],
            )
    seen.compile(chosen)
    return chosen


def _choose_on_the_way(prepared: Prepared, call: Call, tuner: Tuner) -> Chosen:
    """As each one's turn comes: no activation is kept."""
    chosen = Chosen()
    budget = tuner.NEW_SIZE_BUDGET_US

    def choosing(slot: Slot) -> Callable[..., Any]:
        def choose(*args: Any, live_rows: Tensor | None = None) -> Any:
            nonlocal budget
            started = time.perf_counter()
            if slot.name in prepared.rejected:
                chosen.reject(slot)
            else:
                chosen.functions[slot.name], chosen.choices[slot.name] = tuner.choose(
                    slot.op, args, budget_us=max(budget, 0), in_place=slot.in_place, live_rows=live_rows
                )
            budget -= (time.perf_counter() - started) * 1e6
            return chosen.functions[slot.name](*args, **_told(live_rows))

        return choose

    chosen.outputs = _run(prepared.executable, choosing, call)
    return chosen


def choose_differentiable(prepared: Prepared, model: nn.Module, call: Call, tuner: Tuner) -> tuple[Executable, Chosen]:
    """Impls that autograd can go through, for code on the model's own parameters."""
    executable = Executable(prepared.differentiable, model)
    chosen = Chosen()

    def choosing(slot: Slot) -> Callable[..., Any]:
        def choose(*args: Any) -> Any:
            if slot.name in prepared.rejected:
                chosen.reject(slot)
                return slot.op.reference(*args)
            function, choice = tuner.choose(slot.op, args, budget_us=0)
            chosen.choices[slot.name] = choice
            training = None if choice.source == "explicit" else slot.op.training
            chosen.functions[slot.name] = training or slot.op.with_backward(choice.impl)
            return function(*args)

        return choose

    _run(executable, choosing, call)
    return executable, chosen


def _told(live_rows: Tensor | None) -> dict[str, Tensor]:
    return {} if live_rows is None else {"live_rows": live_rows}


def _run(executable: Executable, fill: Callable[[Slot], Callable[..., Any]], call: Call) -> Sequence[Any]:
    functions: Mapping[str, Callable[..., Any]] = {slot.name: fill(slot) for slot in executable.slots}
    with torch.no_grad():
        outputs: Sequence[Any] = executable.bind(functions)(executable.read_weights(), call.leaves)
    return outputs


def _with_activations_of(first: Sequence[Any], args: Sequence[Any], weights: set[int]) -> tuple[Any, ...]:
    """`args` with the tensors of `first`, but for the weights."""
    return tuple(
        kept if isinstance(arg, Tensor) and id(arg) not in weights else arg
        for kept, arg in zip(first, args, strict=True)
    )
