"""`search_schedules`: finds the best of several schedules by measuring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from burnish.scheduling.schedule import Schedule
from burnish.scheduling.search import strategies
from burnish.scheduling.search.result import SearchResult
from burnish.scheduling.search.runner import Runner
from burnish.scheduling.search.space import Choice, Space, Value, key_of
from burnish.scheduling.search.store import Store
from burnish.scheduling.search.task import Task
from burnish.scheduling.search.trial import Trial


def search_schedules(
    make_model: nn.Module | Callable[[], nn.Module],
    space: Mapping[str, Sequence[Value]],
    apply: Callable[[Schedule, Choice], object],
    step: Callable[[nn.Module, Choice], object],
    *,
    work: Callable[[Choice], float] = lambda choice: 1.0,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    ordered: Collection[str] = (),
    memory_limit: float | None = None,
    strategy: Literal["all", "random", "local"] = "all",
    seed: int = 0,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    seconds: float = 1.0,
    path: str | Path | None = None,
    on_trial: Callable[[Trial], object] | None = None,
) -> SearchResult:
    """Tries choices, and finds the one with the highest throughput whose memory is within the limit.

    Each trial makes a clean model, a Schedule of it, has `apply` run primitives on that, builds, and calls `step` many
    times, in turn with the baseline: the first choice that works. What fails is a trial too, with the reason.

    Args:
        make_model: makes the model; or the model itself, which is then copied for each trial and never changed.
        space: by name the values to choose from. Put those first that you use today: there the search begins.
        apply: `apply(sch, choice)` runs primitives on the Schedule `sch`; `choice` is a dict, one value for each name.
        step: `step(module, choice)` is the call that counts, of training or inference. What must outlive a call, such
            as an optimizer, it can keep as an attribute of `module`. Grad mode and autocast are the caller's.
        work: how much a step of a choice does: samples, tokens, ... A larger batch takes longer and does more.
        example_inputs: of `create_schedule`.
        ordered: names whose later values need at least as much memory. What stands behind a choice that had too much is
            then not tried.
        memory_limit: in bytes, of what one trial needs at its peak: weights, gradients, activations and what an
            optimizer keeps. On CUDA that is the peak of the allocator's count, on the CPU that of PyTorch's allocator;
            what was allocated before the trial is not in it.
        strategy: "all"; "random", in an order that `seed` decides; or "local", which changes one name at a time, from
            the best so far, until nothing gets better.
        max_trials: how many choices, at most; those that the file has count.
        max_seconds: after which no other trial begins.
        seconds: of timed calls, for each side of a trial.
        path: a JSON file of all trials, written after each. What is there is not run again, as long as the functions,
            the device and the versions are the same.
        on_trial: is called with each trial, in order: `print`, say.

    Raises ValueError or TypeError for arguments that cannot work, RuntimeError where a trial made the device unusable.
    """
    task = Task(make_model, apply, step, work, example_inputs)
    task.check()
    choices = Space.of(space, ordered)
    if strategy not in strategies.NAMES:
        raise ValueError(f"strategy must be one of {', '.join(strategies.NAMES)}, got {strategy!r}")
    limits = {"memory_limit": memory_limit, "max_trials": max_trials, "max_seconds": max_seconds, "seconds": seconds}
    for name, value in limits.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")

    store = Store(None if path is None else Path(path), task.digest(iter(choices.values)))
    earlier = store.trials()
    known = {key_of(trial.choice): trial for trial in earlier if choices.has(trial.choice)}
    runner = Runner(task, seconds, next((trial for trial in earlier if trial.is_baseline), None))

    def rating(choice: Choice) -> float:
        trial = known.get(key_of(choice))
        if trial is not None and trial.worked and trial.fits(memory_limit):
            return trial.throughput
        return -math.inf

    best = max((trial.choice for trial in known.values()), key=rating, default=choices.first)
    tried: dict[str, Trial] = {}
    end = math.inf if max_seconds is None else time.monotonic() + max_seconds
    for choice in strategies.order_of(strategy, choices, seed=seed, start=best, rating=rating):
        key = key_of(choice)
        if key in tried:
            continue
        if sum(not trial.skipped for trial in tried.values()) == max_trials:
            break
        trial = known.get(key) or _skipped(choice, choices, known.values(), memory_limit)
        if trial is None:
            if time.monotonic() >= end:
                break
            trial = runner.run(choice)
            store.add(trial)
            known[key] = trial
        tried[key] = trial
        if on_trial is not None:
            on_trial(trial)
    return SearchResult(list(tried.values()), choices.count, memory_limit, runner.baseline, task)


def _skipped(choice: Choice, space: Space, known: Collection[Trial], memory_limit: float | None) -> Trial | None:
    """A trial that says why it need not be run; None where it must be."""
    for other in known:
        if not other.fits(memory_limit) and space.needs_as_much(choice, other.choice):
            changed = [f"{name}={value}" for name, value in other.choice.items() if choice[name] != value]
            reason = f"not run: {', '.join(changed)} had too much already"
            return Trial(choice, failure=reason, skipped=True)
    return None
