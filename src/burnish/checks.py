"""What an entry must pass before it serves calls: its outputs right as a whole, each rewritten value right, and no
slower."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.as_given import AsGiven
from burnish.capture import Program
from burnish.choose import Chosen, choose_by_measuring
from burnish.measure import measure, measure_in_step
from burnish.numerics import Verdict
from burnish.parallel.agreement import Agreement
from burnish.parallel.graphs import group_of_call
from burnish.prepare import Prepared
from burnish.ragged.entry import comparable
from burnish.record import StepRecord
from burnish.runtime.module import Call, Entry
from burnish.tuning import Tuner
from burnish.verify import Verification, check_outputs, outputs_in_float64, random_node, restore, verify

_SLOWER = 1.02
VERIFIED_TOKENS = 256  # of a large batch's tokens, about as many are verified
_TINY = torch.finfo(torch.float64).tiny
COMPARISON_BUDGET_US = 150_000.0  # for timing the original against what was made of it


@dataclass(frozen=True)
class Expected:
    """What the outputs of one call are to be: flat, the original's (or of dequantized weights) and in float64."""

    original: list[Any]
    true: list[Any]
    captured: Verdict  # on the original's outputs, by the captured graph's: not ok where capture went wrong


@dataclass(frozen=True)
class Compared:
    """Microseconds of one call: of the original with its weights as the user stored them, of the original with them as
    they are now, and of what was made of it."""

    original_us: float
    original_now_us: float
    optimized_us: float

    @property
    def is_slower(self) -> bool:
        """Than the original in either form: on packed weights it may have become slower, and is what would be kept."""
        return self.optimized_us > _SLOWER * max(self.original_us, self.original_now_us)


class Checks:
    """The checks of one call on one model; what they need is computed once. What is wrong on one rank of a divided
    model counts as wrong on all of them."""

    def __init__(self, model: nn.Module, call: Call, agreement: Agreement | None = None) -> None:
        self.model, self.call = model, call
        self.agreement = agreement or Agreement()
        self._samples: dict[int, Call] = {}
        self._expected: dict[fx.GraphModule, Expected] = {}
        self._as_given: AsGiven | None = None
        self._first_us = math.inf

    def capture_is_right(self, program: Program) -> Verdict | None:
        """Whether the captured graph computes what the model does; None where that cannot be told (dropout is
        active)."""
        return None if random_node(program.captured.graph) else self._expect(program, program.captured).captured

    def remembered_is_right(self, program: Program) -> bool:
        """Whether a Program that this process did not capture computes what the model does: it is compared even where
        nothing else is verified, and what cannot be compared is not believed."""
        try:
            verdict = self.capture_is_right(program)
        except Exception:  # a graph that cannot even be run; or a wrong call, for which the model's own error is raised
            with torch.no_grad():
                self.model(*self.call.args, **self.call.kwargs)
            return False
        return verdict is not None and verdict.ok

    def outputs_are_right(self, prepared: Prepared, entry: Entry, kind: str) -> Verdict | None:
        """The rule on the outputs of `entry`, at the first call of its kind and at the first with sizes of 1 in places
        where export saw none; None where there is nothing to check."""
        program, checked = prepared.program, (kind, _unit_sizes(self.call))
        # Export guards sizes from 2 up itself; checking them again would cost a new shape several runs of the model.
        covered = any(seen == kind for seen, _ in prepared.checked) and not any(map(any, checked[1]))
        if covered or checked in prepared.checked or random_node(program.captured.graph):
            return None
        quantized = prepared.quantization is not None and kind != "differentiable"
        expected = self._expect(program, program.captured if quantized else prepared.captured, quantized)
        if not expected.captured.ok:
            return expected.captured
        with torch.set_grad_enabled(kind == "differentiable"):  # which other code may serve
            result = pytree.tree_leaves(entry(self.sample(program)))
        result = pytree.tree_map_only(Tensor, Tensor.detach, result)
        verdict = self._agreed([check_outputs(result, expected.original, expected.true, program.computed_in)])[0]
        if verdict.ok:
            prepared.checked.add(checked)
        return verdict

    def packed_is_right(self, prepared: Prepared, entry: Entry, kind: str) -> Verdict | None:
        """The rule on what `entry`, without padding, makes of real tokens; None where nothing can be compared."""
        packed = prepared.packed
        assert packed is not None
        assert packed.unpadded.mask is not None
        program = prepared.program
        if random_node(program.captured.graph):
            return None
        quantized = prepared.quantization is not None and kind != "differentiable"
        expected = self._expect(program, program.captured if quantized else prepared.captured, quantized)
        sample = self.sample(program)
        mask = packed.unpadded.mask(sample.leaves)
        with torch.set_grad_enabled(kind == "differentiable"):
            result = pytree.tree_leaves(entry(sample))
        result = pytree.tree_map_only(Tensor, Tensor.detach, result)
        kept = [
            comparable(outputs, packed.unpadded.outputs, packed.unpadded.picked, mask)
            for outputs in (result, expected.original, expected.true)
        ]
        return check_outputs(kept[0], kept[1], kept[2], program.computed_in)

    def time_original(self) -> float:
        """Microseconds of one call of the model as it is now, with its weights as the user stored them."""
        self._as_given, self._first_us = AsGiven(self.model), self.times(None)["original"]
        return self._first_us

    def compare(self, entry: Entry) -> Compared:
        """Times the original and `entry` in turn: between one moment and another the machine may become busier."""
        times = self.times(entry)
        original_us = times["original"]
        if "as given" in times:
            original_us = times["as given"]
        elif self._as_given is not None and self._as_given.is_changed:
            original_us = min(original_us, self._first_us)
        return Compared(original_us, times["original"], times["optimized"])

    def times(self, entry: Entry | None) -> dict[str, float]:
        """Microseconds of one call, "original" and "optimized", in turn; with an entry also the original "as given",
        where packing has stored weights otherwise and a copy of it can be had."""
        args, kwargs = self.call.args, self.call.kwargs
        functions: dict[str, Callable[[], Any]] = {"original": lambda: self.model(*args, **kwargs)}
        known = None if entry is None or self.agreement.is_shared else self._as_given
        if known is not None and (as_given := known.copied()) is not None:
            functions["as given"] = lambda: as_given(*args, **kwargs)
        if entry is not None:
            functions["optimized"] = lambda: entry(self.call)
        if self.agreement.is_shared:
            return self.agreement.first(measure_in_step(functions))
        return measure(functions, [()], budget_us=COMPARISON_BUDGET_US)

    def sample(self, program: Program) -> Call:
        """The part of the call that is verified: some samples of a large batch show what all would, in less time and
        memory."""
        if id(program) not in self._samples:
            leaves = program.first_rows(self.call.leaves, VERIFIED_TOKENS)
            args, kwargs = pytree.tree_unflatten(leaves, self.call.structure())
            self._samples[id(program)] = Call(args, kwargs, leaves, self.call.spec)
        return self._samples[id(program)]

    def _expect(self, program: Program, graph: fx.GraphModule, quantized: bool = False) -> Expected:
        """By a captured graph of the Program; on dequantized weights, that itself stands for the original."""
        if graph not in self._expected:
            sample = self.sample(program)
            with torch.no_grad():
                captured = pytree.tree_leaves(graph(*sample.leaves))
                original = captured if quantized else pytree.tree_leaves(self.model(*sample.args, **sample.kwargs))
            true = outputs_in_float64(graph, sample.leaves)
            # The float64 outputs are the captured graph's: only the original's distance from them shows a wrong
            # capture.
            verdict = self._agreed([check_outputs(original, captured, true, program.computed_in)])[0]
            self._expected[graph] = Expected(original, true, verdict)
        return self._expected[graph]

    def measure_quantization(self, prepared: Prepared) -> None:
        """How far quantized weights move the outputs, into the step's record; nothing where that cannot be told."""
        program, quantization = prepared.program, prepared.quantization
        if quantization is None or random_node(program.captured.graph):
            return
        before = self._expect(program, prepared.captured).true
        after = self._expect(program, program.captured, quantized=True).true
        kept = prepared.executable.borrowed  # a KV cache's: what was in it before says nothing
        pairs = [(a, b) for i, (a, b) in enumerate(zip(after, before, strict=True)) if i not in kept]
        quantization.difference = max((relative_rms(a, b) for a, b in pairs if _is_floating(b)), default=None)
        record = next(record for record in program.history if record.name == "quantize")
        record.numerics[:] = [str(quantization)]

    def verify_values(self, prepared: Prepared, chosen: Chosen, tuner: Tuner) -> Chosen:
        """Verifies every rewritten value. Where an Impl fails, the Op's reference takes its place; where that fails
        too, the captured nodes come back. Leaves a record in the Program's history."""
        started = time.perf_counter()
        program = prepared.program
        record = StepRecord("verify", nodes_before=len(program.graph_module.graph.nodes))
        prepared.verification = verification = self._verify(prepared, chosen)
        if verification.skipped:
            record.notes.append(f"not verified: {verification.skipped}")
        if verification.units:
            passed = len(verification.units) - len(verification.failures)
            record.numerics.append(
                f"{passed} of {len(verification.units)} rewritten values within what eager's own error allows"
            )
        if verification.failures:
            chosen = self._repair(prepared, chosen, tuner, verification, record)
        record.nodes_after = len(program.graph_module.graph.nodes)
        record.seconds = time.perf_counter() - started
        program.history.append(record)
        return chosen

    def _repair(
        self, prepared: Prepared, chosen: Chosen, tuner: Tuner, verification: Verification, record: StepRecord
    ) -> Chosen:
        slots = {slot.origin: slot for slot in prepared.executable.slots}
        for unit in verification.failures:
            reason = unit.verdict.reason if unit.verdict else None
            record.numerics.append(f"{', '.join(unit.ops)} at {unit.node.name}: {reason}")
            for slot in (slots[node.name] for node in unit.inner if node.name in slots):
                prepared.rejected[slot.name] = reason or "failed"
                chosen.reject(slot)
        still_wrong = self._verify(prepared, chosen).failures
        for unit in still_wrong:
            restore(prepared.program.graph_module, prepared.program.captured, unit)
            record.notes.append(f"undone: {', '.join(unit.ops)} at {unit.node.name}; the original nodes stay")
        if not still_wrong:
            return chosen
        prepared.regenerate(self.model)
        return choose_by_measuring(prepared, self.call, tuner)[0]

    def _verify(self, prepared: Prepared, chosen: Chosen) -> Verification:
        slots = {slot.origin: slot for slot in prepared.executable.slots}

        def function_of(node: fx.Node) -> Callable[..., Any]:
            slot = slots[node.name]
            impl, function = slot.op.impls[chosen.choices[slot.name].impl], chosen.functions[slot.name]

            def run(*args: Any) -> Any:
                if group_of_call(slot.op, args):  # it may write to what others are compared by
                    args = tuple(arg.clone() if i in slot.op.donates else arg for i, arg in enumerate(args))
                # Chosen for what the Ops before it write, it may refuse the strides that eager's values have.
                return function(*(map(_contiguous, args) if impl.reasons(*args) else args))

            return run

        program = prepared.program
        leaves = self.sample(program).leaves
        found = verify(program.graph_module, program.captured, leaves, function_of, program.computed_in)
        judged = [unit for unit in found.units if unit.verdict is not None]
        for unit, verdict in zip(judged, self._agreed([unit.verdict for unit in judged if unit.verdict]), strict=True):
            unit.verdict = verdict
        return found

    def _agreed(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of all ranks."""
        oks = self.agreement.all_of([verdict.ok for verdict in verdicts])
        return [
            verdict if ok or not verdict.ok else replace(verdict, ok=False, reason="it is wrong on another rank")
            for verdict, ok in zip(verdicts, oks, strict=True)
        ]


def relative_rms(values: Tensor, true: Tensor) -> float:
    """The root mean square of the difference, relative to that of `true`."""
    return float((values - true).square().sum().sqrt() / true.square().sum().sqrt().clamp_min(_TINY))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _unit_sizes(call: Call) -> Any:
    """Which of the leading dims are 1, leaf by leaf."""
    return tuple(tuple(size == 1 for size in leaf.shape[:2]) for leaf in call.leaves if isinstance(leaf, Tensor))
