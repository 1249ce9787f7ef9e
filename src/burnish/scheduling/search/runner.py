"""`Runner`: runs one trial after the other, each in turn with the baseline."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from burnish.bench import BenchmarkError, benchmark
from burnish.hardware import device
from burnish.scheduling.search.memory import MemoryAccount
from burnish.scheduling.search.space import Choice
from burnish.scheduling.search.task import Task
from burnish.scheduling.search.trial import Trial

_ROUNDS = 3
_BASELINE, _TRIAL = "the baseline", "the trial"
_LONGEST_REASON = 200
_CPU_REFUSED = "DefaultCPUAllocator: can't allocate memory: "  # in what PyTorch raises


@dataclass(frozen=True)
class _Built:
    """A choice's module, ready to be called."""

    module: nn.Module
    call: Callable[[], Tensor | None]
    device: torch.device


class Runner:
    """Measures choices of a task.

    Attributes:
        baseline: the first trial that worked; None until there is one. Its module stays alive, so that what comes later
            runs in turn with it, except where both do not fit into memory.

    Args:
        seconds: of timed calls, for each side of a trial.
        baseline: of an earlier search.
    """

    def __init__(self, task: Task, seconds: float, baseline: Trial | None) -> None:
        self._task, self._seconds = task, seconds
        self.baseline = baseline
        self._standing: _Built | None = None

    def run(self, choice: Choice) -> Trial:
        """What came of a choice; errors of the model or of a primitive are in the trial.

        Raises RuntimeError where the device cannot be used any more.
        """
        try:
            if self.baseline is not None and self._standing is None:
                self._stand_baseline()
            trial = self._tried(choice)
            if trial.out_of_memory and self._standing is not None:
                self._standing = None
                self._clean_up()
                trial = self._tried(choice)
        finally:
            self._clean_up()
        if trial.is_baseline:
            self.baseline = trial
        return trial

    def _tried(self, choice: Choice) -> Trial:
        try:
            return self._measured(choice)
        except torch.AcceleratorError as error:  # every later call would fail too
            raise RuntimeError(f"{choice} broke the device, start anew without it: {_reason(error)}") from error
        except Exception as error:
            return Trial(choice, failure=_reason(error), out_of_memory=_is_out_of_memory(error))

    def _measured(self, choice: Choice) -> Trial:
        work = float(self._task.work(dict(choice)))
        if not (math.isfinite(work) and work > 0):
            raise ValueError(f"work(choice) must be a positive number, it returned {work}")
        account = MemoryAccount()
        built = self._build(choice)
        memory = account.peak(built.module, built.call, built.device)
        alone = {_TRIAL: built.call}
        variants = alone if self._standing is None else {_BASELINE: self._standing.call, **alone}
        result = benchmark(variants, seconds=self._seconds, rounds=_ROUNDS)
        seconds = result.timings[_TRIAL].median_us / 1e6
        trial = Trial(choice, work, seconds, memory, device=device(built.device, measure=False).label)
        if self.baseline is None:
            self._standing = built
            return replace(trial, is_baseline=True)
        if self._standing is None:
            return replace(trial, in_turn=False)
        assert self.baseline.seconds is not None
        return replace(trial, seconds=self.baseline.seconds / result.speedups[_TRIAL])

    def _build(self, choice: Choice) -> _Built:
        """The module of a choice, called once, so that it is compiled, and an optimizer has its state."""
        module = self._task.schedule(self._task.clean_model(), choice).build()
        first = next(chain(module.parameters(), module.buffers()), None)
        where = torch.device("cpu") if first is None else first.device

        def call() -> Tensor | None:
            self._task.step(module, dict(choice))
            return first  # by which `benchmark` sees the device

        call()
        return _Built(module, call, where)

    def _stand_baseline(self) -> None:
        """Builds that of an earlier search again. Where it fails now, what follows is measured alone."""
        assert self.baseline is not None
        try:
            self._standing = self._build(self.baseline.choice)
        except Exception:
            self._standing = None
            self._clean_up()

    @staticmethod
    def _clean_up() -> None:
        """Frees what the last trial held."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            # It compiles a piece of code for eight modules at most, and runs it as it is for those that come later.
            torch.compiler.reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _causes(error: BaseException) -> list[BaseException]:
    cause = error.__cause__
    return [error, *(_causes(cause) if cause is not None else [])]


def _is_out_of_memory(error: BaseException) -> bool:
    return any(
        isinstance(each, (torch.OutOfMemoryError, MemoryError)) or _CPU_REFUSED in str(each) for each in _causes(error)
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, BenchmarkError) and error.__cause__ is not None:
        error = error.__cause__
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = next(iter(str(said).strip().splitlines()), "")
    if _is_out_of_memory(error):
        text = f"out of memory: {line.rpartition(_CPU_REFUSED)[2]}"
    else:
        text = f"{type(error).__name__}: {line}"
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."
