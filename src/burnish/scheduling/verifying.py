"""`verify`: a scheduled model computes what the model as it was does; and which step is to blame where it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor

from burnish.parallel.agreement import Agreement
from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.comparing import Comparison, Reference, Setting, relative_error
from burnish.scheduling.fresh_inputs import fresh_inputs
from burnish.scheduling.quantized_linear import QuantizedLinear, quantized_in, with_dequantized
from burnish.scheduling.snapshot import Snapshot
from burnish.scheduling.step import Step
from burnish.scheduling.tree import join

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Work

_INPUTS = 3  # so many different ones, each with a seed of its own
_DIVIDING = ("shard", "sync")  # between the first and the last of these a model is not right, and need not be


class VerificationError(ValueError):
    """A scheduled model does not compute what the model as it was does.

    It is a ValueError, as every other reason is why a step cannot be applied: within `with sch.verified()` the step
    that failed was undone before.

    Attributes:
        number: of the step that broke it, from 1; None where it cannot be told.
        right: how many steps had been applied when it was right.
    """

    def __init__(self, message: str, number: int | None, right: int) -> None:
        super().__init__(message)
        self.number, self.right = number, right


@dataclass(frozen=True)
class Verified:
    """What `verify` compared, and found equal. Print it.

    Attributes:
        inputs: how many different inputs.
        outputs, gradients: how many of each.
        training: whether the model was in train mode.
        closest: the result that came closest to what is allowed for it, with its `error`, and what is `allowed`.
        notes: what could not be compared as it was asked for; and what was changed on purpose (quantized weights).
    """

    inputs: int
    outputs: int
    gradients: int
    training: bool
    closest: str
    error: float
    allowed: float
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        counts = [_count(self.outputs, "output"), *([_count(self.gradients, "gradient")] if self.gradients else [])]
        mode = "train" if self.training else "eval"
        said = f"verified: {' and '.join(counts)} on {_count(self.inputs, 'input')} in {mode} mode"
        if self.allowed:
            said += f"; closest {self.closest}, its error {self.error:.2g} of {self.allowed:.2g} allowed"
        return [said, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def verify(work: Work, inputs: Any = None, seed: int = 0) -> Verified:
    """See `Schedule.verify`."""
    return _Verification(work, inputs, seed).run()


@contextlib.contextmanager
def verified(work: Work, undo: Callable[[int], Any], inputs: Any = None, seed: int = 0) -> Iterator[None]:
    """See `Schedule.verified`. `undo` takes back so many of the last steps."""
    _Verification(work, inputs, seed)  # what cannot be verified is said now
    if work.history and not work.history[-1].verified:
        verify(work, inputs, seed)  # what was wrong before is no step's fault
    first, before, waiting = len(work.history), work.after_step, False

    def check() -> None:
        try:
            verify(work, inputs, seed)
        except VerificationError as error:
            undo(len(work.history) - max(error.right, first))
            raise

    def after_step(step: Step) -> None:
        nonlocal waiting
        waiting = step.primitive in _DIVIDING
        if not waiting:
            check()

    work.after_step = after_step
    try:
        yield
    finally:
        work.after_step = before
    if waiting and work.history:
        check()


class _Verification:
    def __init__(self, work: Work, inputs: Any, seed: int) -> None:
        self.work = work
        given = ExampleInputs.of(inputs)
        like = given or work.example_inputs
        if like is None:
            raise ValueError("verify: give inputs, or give create_schedule example inputs of which others are made")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"verify: seed must be an integer, got {seed!r}")
        self.cases = {seed: given} if given else {seed + i: fresh_inputs(like, seed + i) for i in range(_INPUTS)}
        self.training = work.tree.model.training
        self.agreement = Agreement()
        self.agreement.join_model(work.tree.model)

    def run(self) -> Verified:
        self._check_syncs()
        found, changed = [], []
        for seed, inputs in self.cases.items():
            references = _References(self.work, inputs, Setting(self.training, self.training, seed))
            comparison = references.compare(self.agreement)
            if not comparison.ok:
                raise self._error(references, comparison)
            found.append(comparison)
            changed.append(references.change)
        closest = max(found, key=lambda comparison: comparison.share)
        notes = list(dict.fromkeys(note for comparison in found for note in comparison.notes))
        if quantized := quantized_in(self.work.tree.model):
            kinds = " and ".join(sorted({each.kind for each in quantized}))
            weights = _count(len(quantized), "weight")
            said = f"quantized ({kinds}, {weights}): by itself this makes outputs differ by up to"
            notes.append(f"{said} {max(changed):.2%} (rms)")
        if self.work.settings is not None:
            notes.append("what optimize does with it is verified by itself, at the first call of the built model")
        result = Verified(
            len(found),
            closest.outputs,
            closest.gradients,
            self.training,
            closest.closest,
            closest.verdict.error,
            closest.verdict.allowed,
            notes,
        )
        if self.work.history:
            last = self.work.history[-1]
            last.verified, last.numerics = True, result.lines
        return result

    # --- who is to blame ------------------------------------------------------------------------------------------

    def _error(self, references: _References, now: Comparison) -> VerificationError:
        history = self.work.history
        if not history:
            return VerificationError(_changed_otherwise(now), None, 0)
        found = self._first_wrong(references, now)
        if found is None:
            return VerificationError(_changed_otherwise(now), None, len(history))
        right, wrong, comparison = found
        what = f"{comparison.closest} is wrong: {comparison.verdict.reason}"
        seeds = f" (inputs and random numbers from seed {references.setting.seed})"
        if wrong - right == 1:
            where = _named(right + 1, history[right])
        else:
            primitives = dict.fromkeys(step.primitive for step in history[right:wrong])
            where = f"steps {right + 1} to {wrong}, {' and '.join(primitives)}"
        return VerificationError(f"{where}: {what}{seeds}", right + 1, right)

    def _first_wrong(self, references: _References, now: Comparison) -> tuple[int, int, Comparison] | None:
        """How many steps leave the model right, and how many then make it wrong, with what is wrong. None where it is
        wrong before the first step."""
        history = self.work.history
        ends = _ends(history)
        known = max((end for end in ends if end < len(history) and history[end - 1].verified), default=0)
        current = Snapshot.take(self.work.tree)
        try:
            for start in dict.fromkeys((known, 0)):  # what was verified may be wrong in another mode, on other inputs
                if self._after(start, references).ok:
                    right = start
                    for end in (end for end in ends if end > start):
                        comparison = now if end == len(history) else self._after(end, references)
                        if not comparison.ok:
                            return right, end, comparison
                        right = end
        finally:
            current.restore()
        return None

    def _after(self, steps: int, references: _References) -> Comparison:
        # The step of a model that was optimized from the start has none: it changed no module.
        before = next((step.before for step in self.work.history[steps:] if step.before is not None), None)
        if before is not None:
            before.restore()
        return references.compare(self.agreement)

    # --- several ranks --------------------------------------------------------------------------------------------

    def _check_syncs(self) -> None:
        """A divided model whose parts are not summed gives wrong gradients also where nothing shows it yet."""
        if not self.agreement.is_shared:
            return
        from burnish.parallel import missing_syncs

        missing = next(missing_syncs(self.work.tree.model, training=self.training), None)
        if missing is None:
            return
        path = missing.partition(":")[0]
        for number, step in reversed(list(enumerate(self.work.history, 1))):
            if step.primitive == "shard" and _cut(step, join(path, "weight")):
                right = max((end for end in _ends(self.work.history) if end < number), default=0)
                raise VerificationError(f"{_named(number, step)}: a sync is missing: {missing}", number, right)
        raise VerificationError(f"a sync is missing: {missing}", None, len(self.work.history))


class _References:
    """What the scheduled model is compared with on some inputs: the model as it was; where weights were quantized, with
    the dequantized ones in their place."""

    def __init__(self, work: Work, inputs: ExampleInputs, setting: Setting) -> None:
        self.work, self.inputs, self.setting = work, inputs, setting
        self._made: dict[tuple[int, ...], Reference] = {}

    def compare(self, agreement: Agreement) -> Comparison:
        """Of the model as it is in the tree now."""
        model = self.work.tree.model
        return self._reference(quantized_in(model)).compare(model, agreement)

    @property
    def change(self) -> float:
        """How far quantized weights alone put outputs from the model's: of that in which it is most."""
        quantized = quantized_in(self.work.tree.model)
        if not quantized:
            return 0.0
        before, after = self._reference([]).exact.outputs, self._reference(quantized).exact.outputs
        floats = [name for name, value in before.items() if isinstance(value, Tensor) and value.is_floating_point()]
        return max((relative_error(after[name], before[name]) for name in floats), default=0.0)

    def _reference(self, quantized: list[QuantizedLinear]) -> Reference:
        key = tuple(map(id, quantized))
        if key not in self._made:
            original = with_dequantized(self.work.original, quantized) if quantized else self.work.original
            made = self._made[key] = Reference(original, self.work.names, self.inputs, self.setting)
            if made.unsteady is not None:
                said = f"output{made.unsteady} of the model as it was is another at a second call"
                raise VerificationError(f"nothing can be verified: {said}", None, len(self.work.history))
        return self._made[key]


def _ends(history: list[Step]) -> list[int]:
    """The numbers of steps after which the model should be right: after each, but not in the middle of a division."""
    last = len(history)
    return [
        n
        for n in range(1, last + 1)
        if n == last or not all(step.primitive in _DIVIDING for step in history[n - 1 : n + 1])
    ]


def _cut(step: Step, path: str) -> bool:
    """Whether a `shard` step cut the parameter of that path; its own may have `*` in it."""
    cut = join(step.path, str(step.arguments["name"])).split(".")
    return len(cut) == len(path.split(".")) and all(map(fnmatchcase, path.split("."), cut))


def _named(number: int, step: Step) -> str:
    return f"step {number}, {step.primitive} in {step.path or 'the model'}"


def _changed_otherwise(found: Comparison) -> str:
    reason = f"{found.closest} is wrong: {found.verdict.reason}"
    return f"before any step the scheduled model is not the model that was given, one of them was changed: {reason}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
