"""What is done with the whole model of a Schedule, whichever part of it the Schedule is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.step import Step
from burnish.scheduling.verifying import Verified, verified, verify

if TYPE_CHECKING:
    from torch.distributed.pipelining import Pipe

    from burnish.scheduling.schedule import Work


class WholeModel(ABC):
    """Verifies, saves and splits a scheduled model."""

    _work: Work

    @abstractmethod
    def undo(self, n: int | str = 1) -> list[Step]:
        """Takes back the last `n` steps."""

    def verify(self, inputs: Any = None, *, seed: int = 0) -> Verified:
        """Compares the scheduled model with the model as it was, by the one rule of `burnish.numerics`: outputs, and in
        train mode the gradients of every parameter, by the model's own names also where weights were merged.

        Random numbers (dropout) are the same on both sides; where they cannot be, because a step draws others, the two
        are compared in eval mode, and the result says so. Nothing changes: no `grad`, no statistics, no random state.
        On a divided model all ranks have to call it.

        Args:
            inputs: of one call of the whole model, a tuple or a dict, on which it is compared. None: on three others
                that are like `create_schedule`'s example inputs (see `burnish.scheduling.fresh_inputs`).
            seed: of their values, and of the random numbers.

        Raises VerificationError, which names the step that broke it; ValueError where there are no inputs.
        """
        return verify(self._work, inputs, seed)

    @contextmanager
    def verified(self, inputs: Any = None, *, seed: int = 0) -> Iterator[None]:
        """Within the `with`, verifies after each step. One that breaks the model is undone, and VerificationError
        raised. `shard` and `sync` are verified together, when another step follows or the block ends."""
        with verified(self._work, self.undo, inputs, seed):
            yield

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the steps as JSON, for `burnish.scheduling.load` to apply to this model or another of the family.

        Raises ValueError, with the step and the argument, for what cannot be said as data: a module, a function that
        cannot be imported.
        """
        from burnish.scheduling.saved import save

        save(self._work.history, path)

    def build_pipeline(self, inputs: Any = None) -> Pipe:
        """The model split behind each submodule on which `cut_pipeline_stage` was called, as torch's Pipe:
        `pipe.build_stage(rank, device)` gives the stage of a rank, `torch.distributed.pipelining` has the schedules.

        Args:
            inputs: of one microbatch, a tuple or a dict; None: `create_schedule`'s example inputs.

        Raises ValueError where nothing was cut, or a cut is inside of another.
        """
        from burnish.scheduling.pipeline import build_pipeline

        return build_pipeline(self._work.tree.model, ExampleInputs.of(inputs) or self._work.example_inputs)
