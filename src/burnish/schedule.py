"""`Schedule`: a model and the steps applied to it. `optimize()` is a Schedule that runs the default steps at the first call.

A Schedule captures one Program for each structure of inputs (dtype, rank, None-ness, train or eval), and serves every batch and
sequence size from it: for a new size only the Impls are chosen anew.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.capture import CaptureError, Program, capture
from burnish.lower import Executable, Places, Slot, WeightPlace, find_weight
from burnish.numerics import Verdict
from burnish.op import find_impl
from burnish.ops import linear
from burnish.pack import pack
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply
from burnish.runtime.module import STALE, Call, Entry, OptimizedModule, original_entry
from burnish.tuning import CacheMode, Choice, Tuner, key_of, measure
from burnish.verify import Verification, check_outputs, outputs_in_float64, random_node, restore, verify

if TYPE_CHECKING:
    from burnish.report import Report

FIRST_BUDGET_US = 120_000.0  # for each distinct product, norm, ... of the first call
NEW_SIZE_BUDGET_US = 25_000.0  # for all of a new size together
VERIFIED_TOKENS = 512  # of a large batch's tokens, about as many are verified
_SLOWER = 1.02


@dataclass(frozen=True)
class Settings:
    """The arguments of `optimize`."""

    verify: bool = True
    impls: Mapping[str, str] = field(default_factory=dict)
    cache: CacheMode = "readwrite"
    cuda_graphs: str = "auto"


@dataclass
class Served:
    """How one input signature is served.

    Attributes:
        shapes: the tensor inputs' shapes by name.
        choices: the Impl chosen for each slot, by slot name.
        original_us, optimized_us: median time of one call before and after, where it was measured.
        kept_original: why the original model serves this signature, or None.
    """

    shapes: dict[str, tuple[int, ...]]
    choices: dict[str, Choice] = field(default_factory=dict)
    original_us: float | None = None
    optimized_us: float | None = None
    kept_original: str | None = None
    seconds: float = 0.0


@dataclass
class _Prepared:
    """A Program with the code generated from it, ready to be bound."""

    program: Program
    training: bool
    executable: Executable
    differentiable: fx.GraphModule
    members: list[WeightPlace]  # the parameters that became views of packed weights
    places: Places
    verified: bool = False
    verification: Verification | None = None
    rejected: dict[str, str] = field(default_factory=dict)  # slots whose Impl failed verification, and why
    checked: set[Any] = field(
        default_factory=set
    )  # where the inputs had sizes of 1 in calls whose outputs were compared


@dataclass(frozen=True)
class _Expected:
    """What the outputs of one call are to be: flat, the original's and in float64."""

    program: Program
    sample: Call
    original: list[Any]
    true: list[Any]
    captured: Verdict  # on the original's outputs, by the captured graph's: not ok where capture went wrong


class Schedule:
    """A model, its Programs, and every step that was applied to them."""

    def __init__(self, model: nn.Module, settings: Settings | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        for op, impl in self.settings.impls.items():
            find_impl(op, impl)
        self.tuner = Tuner(self.settings.cache, dict(self.settings.impls))
        self.served: list[Served] = []
        self._prepared: list[_Prepared] = []
        self._uncapturable: dict[Any, str] = {}
        self._sampled: tuple[Call, Call] | None = None  # the present call and the part of it that is verified
        self._expected: _Expected | None = None  # what the present call's outputs are to be

    @property
    def program(self) -> Program:
        """The Program of the first captured structure. ValueError before the first call."""
        if not self._prepared:
            raise ValueError(
                "nothing is captured yet: call the optimized model once, or give optimize() example inputs"
            )
        return self._prepared[0].program

    @property
    def history(self) -> list[StepRecord]:
        """Every step of every Program, in order."""
        return [record for prepared in self._prepared for record in prepared.program.history]

    @property
    def verifications(self) -> list[Verification]:
        return [p.verification for p in self._prepared if p.verification is not None]

    def build(self) -> OptimizedModule:
        """The model with the scheduled steps applied (at the first call, where no inputs are known yet)."""
        return OptimizedModule(self.model, self)

    def report(self) -> Report:
        from burnish.report import Report

        return Report(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy (or what is unpickled) starts afresh, with the same settings."""
        return type(self), (self.model, self.settings)

    # --- what the OptimizedModule asks for ----------------------------------------------------------------------------------------

    def entry(self, call: Call, differentiable: bool) -> Entry:
        """The entry for one signature; captures, rewrites, tunes and verifies where that has not happened yet."""
        started = time.perf_counter()
        served = Served(_shapes(call))
        with torch.random.fork_rng(_cuda_indices(call)):  # a model with dropout draws what it would draw anyway
            prepared, reason = self._prepare(call)
            if prepared is None:
                served.kept_original = reason
                entry = original_entry(self.model)
            elif differentiable:
                entry = self._differentiable_entry(prepared, call, served)
            else:
                entry = self._entry(prepared, call, served)
        self._expected = self._sampled = None
        served.seconds = time.perf_counter() - started
        self.served.append(served)
        self.tuner.save()
        return entry

    def forget(self) -> None:
        """Drops every Program: the weights have moved (`.to()`, a parameter replaced, `load_state_dict(assign=True)`)."""
        self._prepared.clear()
        self._uncapturable.clear()

    # --- capture and rewrite ------------------------------------------------------------------------------------------------------

    def _prepare(self, call: Call) -> tuple[_Prepared | None, str | None]:
        spec = call.structure()
        if any(prepared.places.read() is None for prepared in self._prepared):
            self.forget()
        for prepared in self._prepared:
            program = prepared.program
            if (
                program.in_spec == spec
                and prepared.training == self.model.training
                and not program.rejects(call.leaves)
            ):
                return prepared, None
        structure = (str(spec), self.model.training, *(_structure(leaf) for leaf in call.leaves))
        if structure in self._uncapturable:
            return None, self._uncapturable[structure]
        try:
            program = self._capture(call)
        except CaptureError as error:
            with torch.no_grad():
                self.model(*call.args, **call.kwargs)  # a call that is wrong raises the model's own error here
            self._uncapturable[structure] = str(error)
            return None, str(error)
        prepared = self._rewrite(program)
        self._prepared.append(prepared)
        return prepared, None

    def _capture(self, call: Call) -> Program:
        """A Program that computes what the model computes, on this call's inputs at least."""
        reason = None
        for attention_interface in (True, False):
            program = capture(self.model, call.args, call.kwargs, attention_interface=attention_interface)
            if not self.settings.verify or random_node(program.captured.graph):
                return program
            verdict = self._expect(program, call).captured
            if verdict.ok:
                return program
            reason = verdict.reason
            if not program.attention_interface:
                break
        raise CaptureError(f"the captured graph computes something else: {reason}")

    def _expect(self, program: Program, call: Call) -> _Expected:
        """What a call's outputs are to be, and whether the captured graph computes what the model does."""
        sample = self._sample(program, call)
        expected = self._expected
        if expected is None or expected.program is not program or expected.sample is not sample:
            with torch.no_grad():
                original = pytree.tree_leaves(self.model(*sample.args, **sample.kwargs))
                captured = pytree.tree_leaves(program.captured(*sample.leaves))
            true = outputs_in_float64(program.captured, sample.leaves)
            # The float64 outputs are the captured graph's: only the original's distance from them shows a wrong capture.
            verdict = check_outputs(original, captured, true)
            expected = self._expected = _Expected(program, sample, original, true, verdict)
        return expected

    def _compare_outputs(self, program: Program, call: Call, run: Callable[[Call], Any]) -> Verdict:
        """The rule on the model's outputs: those of `run` against the original's and the captured graph's in float64."""
        expected = self._expect(program, call)
        if not expected.captured.ok:
            return expected.captured
        with torch.no_grad():
            result = pytree.tree_leaves(run(expected.sample))
        return check_outputs(result, expected.original, expected.true)

    def _rewrite(self, program: Program) -> _Prepared:
        graph_module = program.graph_module
        program.history.append(apply("raise", RAISE, graph_module))
        program.history.append(apply("fuse", FUSE, graph_module))
        differentiable = _copied(graph_module)
        packs, record = pack(graph_module, self.model, self._wants_transposed)
        program.history.append(record)
        members = [find_weight((self.model,), member.path) for packed in packs for member in packed.members]
        executable = Executable(graph_module, self.model)
        places = Places(self.model, (*executable.weights, *members))
        return _Prepared(program, self.model.training, executable, differentiable, members, places)

    def _wants_transposed(self, weight: fx.Node) -> bool:
        """Whether products read this weight faster when it is stored (K, N): measured on its first reader's sizes."""
        value: Tensor = weight.meta["val"]
        reader = next((user for user in weight.users if user.target is linear.overload), None)
        if value.device.type != "cpu" or value.shape[0] < 16:
            return False
        rows = _hinted_rows(reader.args[0].meta["val"]) if reader is not None else 128  # type: ignore[union-attr]
        return self.tuner.prefers_transposed(linear, rows, value, budget_us=FIRST_BUDGET_US)

    def _sample(self, program: Program, call: Call) -> Call:
        """The part of a call that is verified: some samples of a large batch show what all would, in less time and memory."""
        if self._sampled is None or self._sampled[0] is not call:
            leaves = program.first_rows(call.leaves, VERIFIED_TOKENS)
            args, kwargs = pytree.tree_unflatten(leaves, call.structure())
            self._sampled = call, Call(args, kwargs, leaves, call.spec)
        return self._sampled[1]

    # --- entries ------------------------------------------------------------------------------------------------------------------

    def _entry(self, prepared: _Prepared, call: Call, served: Served) -> Entry:
        first = not prepared.verified
        functions = (
            self._choose_all(prepared, call, served) if first else self._choose_at_first_run(prepared, call, served)
        )
        if first and self.settings.verify:
            functions = self._verify(prepared, call, served, functions)
        prepared.verified = True
        entry = _bound(prepared, functions, self.model)
        if self.settings.verify:
            entry = self._unless_different(prepared, entry, call, served)
        if first and served.kept_original is None and not self.model.training:
            entry = self._unless_slower(entry, call, served)
        return entry

    def _choose_all(self, prepared: _Prepared, call: Call, served: Served) -> dict[str, Callable[..., Any]]:
        """Runs once, keeping one set of activations for each distinct signature, and measures the Impls on them."""
        seen: dict[Any, list[tuple[Any, ...]]] = {}
        keys: dict[str, Any] = {}

        def recording(slot: Slot) -> Callable[..., Any]:
            def record(*args: Any) -> Any:
                key = keys[slot.name] = key_of(slot.op, args)
                instances = seen.setdefault(key, [])
                # Other layers' weights on the first layer's activations: little is kept alive, and weights come from memory.
                instances.append(args if not instances else _with_activations_of(args, instances[0]))
                return slot.op.select(*args).fn(*args)

            return record

        with torch.no_grad():
            _run(prepared, {slot.name: recording(slot) for slot in prepared.executable.slots}, call)
        functions = {}
        for slot in prepared.executable.slots:
            args, *others = seen[keys[slot.name]]
            impl, served.choices[slot.name] = self.tuner.choose(
                slot.op, args, budget_us=FIRST_BUDGET_US, variants=others
            )
            functions[slot.name] = impl.fn
        return functions

    def _choose_at_first_run(self, prepared: _Prepared, call: Call, served: Served) -> dict[str, Callable[..., Any]]:
        """Runs once and chooses on the way: remembered or nearby choices, and a small budget for what is unknown."""
        functions: dict[str, Callable[..., Any]] = {}
        budget = NEW_SIZE_BUDGET_US

        def choosing(slot: Slot) -> Callable[..., Any]:
            def choose(*args: Any) -> Any:
                nonlocal budget
                started = time.perf_counter()
                if slot.name in prepared.rejected:
                    functions[slot.name] = slot.op.reference
                    served.choices[slot.name] = Choice("reference", source="verified")
                else:
                    impl, served.choices[slot.name] = self.tuner.choose(slot.op, args, budget_us=max(budget, 0))
                    functions[slot.name] = impl.fn
                budget -= (time.perf_counter() - started) * 1e6
                return functions[slot.name](*args)

            return choose

        with torch.no_grad():
            _run(prepared, {slot.name: choosing(slot) for slot in prepared.executable.slots}, call)
        return functions

    def _differentiable_entry(self, prepared: _Prepared, call: Call, served: Served) -> Entry:
        """Gradients have to reach the model's own parameters: from the graph as it was before packing, with Impls that
        autograd can go through."""
        executable = Executable(prepared.differentiable, self.model)
        functions: dict[str, Callable[..., Any]] = {}

        def choosing(slot: Slot) -> Callable[..., Any]:
            def choose(*args: Any) -> Any:
                if slot.name in prepared.rejected:
                    impl, served.choices[slot.name] = slot.op.impls["reference"], Choice("reference", source="verified")
                else:
                    impl, served.choices[slot.name] = self.tuner.choose(slot.op, args, budget_us=0)
                functions[slot.name] = slot.op.with_backward(impl)
                return impl.fn(*args)

            return choose

        with torch.no_grad():
            executable.bind({slot.name: choosing(slot) for slot in executable.slots})(
                executable.read_weights(), call.leaves
            )
        entry = _bound(prepared, functions, self.model, executable)
        return self._unless_different(prepared, entry, call, served, "differentiable") if self.settings.verify else entry

    # --- checks -------------------------------------------------------------------------------------------------------------------

    def _verify(
        self, prepared: _Prepared, call: Call, served: Served, functions: dict[str, Callable[..., Any]]
    ) -> dict[str, Callable[..., Any]]:
        """Verifies every unit. Where an Impl fails, the Op's reference takes its place; where that fails too, the captured nodes."""
        started = time.perf_counter()
        program = prepared.program
        record = StepRecord("verify", nodes_before=len(program.graph_module.graph.nodes))
        prepared.verification = verification = self._checked(prepared, call, functions)
        if verification.skipped:
            record.notes.append(f"not verified: {verification.skipped}")
        slot_of = {slot.origin: slot for slot in prepared.executable.slots}
        if failures := verification.failures:
            for unit in failures:
                for node in unit.inner:
                    if (slot := slot_of.get(node.name)) is not None:
                        reason = unit.verdict.reason if unit.verdict else None
                        prepared.rejected[slot.name] = reason or "failed"
                        functions[slot.name] = slot.op.reference
                        served.choices[slot.name] = Choice("reference", source="verified")
                record.numerics.append(f"{', '.join(unit.ops)} at {unit.node.name}: {unit.verdict.reason}")  # type: ignore[union-attr]
            again = self._checked(prepared, call, functions)
            for unit in again.failures:
                restore(program.graph_module, program.captured, unit)
                record.notes.append(f"undone: {', '.join(unit.ops)} at {unit.node.name}; the original nodes stay")
            if again.failures:
                prepared.executable = Executable(program.graph_module, self.model)
                prepared.differentiable = _copied(program.captured)
                prepared.rejected.clear()
                served.choices.clear()
                functions = self._choose_all(prepared, call, served)
        passed = len(verification.units) - len(failures)
        if verification.units:
            record.numerics.insert(
                0, f"{passed} of {len(verification.units)} rewritten values within twice eager's own error"
            )
        record.nodes_after = len(program.graph_module.graph.nodes)
        record.seconds = time.perf_counter() - started
        program.history.append(record)
        return functions

    def _checked(self, prepared: _Prepared, call: Call, functions: dict[str, Callable[..., Any]]) -> Verification:
        names = {slot.origin: slot.name for slot in prepared.executable.slots}
        program = prepared.program
        leaves = self._sample(program, call).leaves
        return verify(program.graph_module, program.captured, leaves, lambda node: functions[names[node.name]])

    def _unless_slower(self, entry: Entry, call: Call, served: Served) -> Entry:
        """The original where it measures faster."""
        with torch.no_grad():
            times = measure(
                {"original": lambda: self.model(*call.args, **call.kwargs), "optimized": lambda: entry(call)},
                [()],
                budget_us=600_000.0,
            )
        served.original_us, served.optimized_us = times["original"], times["optimized"]
        if served.optimized_us > _SLOWER * served.original_us and not self.settings.impls:
            served.kept_original = "no Impl beat the original"
            return original_entry(self.model)
        return entry

    def _unless_different(
        self, prepared: _Prepared, entry: Entry, call: Call, served: Served, kind: str = "inference"
    ) -> Entry:
        """The original where the outputs as a whole are not right: at the first call, and at the first with sizes of 1 in places
        where export saw none."""
        checked = kind, _unit_sizes(call)
        # Export guards sizes from 2 up itself; checking them again would cost a new shape several runs of the model.
        covered = any(seen == kind for seen, _ in prepared.checked) and not any(map(any, checked[1]))
        if covered or checked in prepared.checked or random_node(prepared.program.captured.graph):
            return entry
        verdict = self._compare_outputs(prepared.program, call, entry)
        if verdict.ok:
            prepared.checked.add(checked)
            return entry
        served.kept_original = f"the outputs differ from the original's: {verdict.reason}"
        return original_entry(self.model)


def optimize(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    impls: Mapping[str, str] | None = None,
    cache: CacheMode = "readwrite",
    cuda_graphs: str = "auto",
) -> OptimizedModule:
    """Makes `model` fast: captures it, fuses what Ops can do, chooses each Op's fastest Impl on this machine, and verifies it.

    Args:
        model: any nn.Module. Its weights are shared, not copied; some become views of packed tensors.
        args, kwargs: example inputs. With them everything happens now, without them at the first call.
        verify: compare every rewritten value with a float64 oracle on the first call's activations; what fails is undone.
        impls: Impl names by Op name that are to be used, e.g. `{"attention": "torch_flash"}`; never falls back.
        cache: measured choices on disk: "readwrite", "readonly" or "off".
        cuda_graphs: "auto" or "never"; on the CPU there are none.

    Returns:
        A module with the same forward, outputs and parameters. New batch and sequence sizes need no new capture. What cannot be
        captured runs as it was: `.report()` says why.

    Raises:
        TypeError, ValueError: a bad argument; the model's own error for bad example inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise TypeError("model: this one is optimized already; give the module it was made from")
    if not isinstance(args, tuple):
        raise TypeError(
            f"args: a tuple of positional inputs is needed, not {type(args).__name__}; write (x,) for one input"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs: a mapping of keyword inputs is needed, not {type(kwargs).__name__}; write {{'mask': mask}}")
    if cuda_graphs not in ("auto", "never"):
        raise ValueError(f"cuda_graphs={cuda_graphs!r}: use 'auto' or 'never'")
    schedule = Schedule(model, Settings(verify, dict(impls or {}), cache, cuda_graphs))
    fast = schedule.build()
    if args or kwargs:
        with torch.no_grad():
            fast(*args, **(kwargs or {}))
    return fast


def _bound(
    prepared: _Prepared,
    functions: Mapping[str, Callable[..., Any]],
    model: nn.Module,
    executable: Executable | None = None,
) -> Entry:
    executable = executable or prepared.executable
    run = executable.bind(functions)
    unflatten = prepared.program.out_spec.unflatten
    places = Places(model, (*executable.weights, *prepared.members))
    count = len(executable.weights)

    def entry(call: Call) -> Any:
        weights = places.read()
        return STALE if weights is None else unflatten(run(weights[:count], call.leaves))

    return entry


def _run(prepared: _Prepared, functions: Mapping[str, Callable[..., Any]], call: Call) -> None:
    executable = prepared.executable
    executable.bind(functions)(executable.read_weights(), call.leaves)


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def _with_activations_of(args: Sequence[Any], first: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        arg if isinstance(arg, nn.Parameter) or not isinstance(arg, Tensor) else kept
        for arg, kept in zip(args, first, strict=True)
    )


def _hinted_rows(value: Tensor) -> int:
    """How many rows this activation had when captured."""
    rows = 1
    for size in value.shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint or 1
    return min(rows, 4096)


def _shapes(call: Call) -> dict[str, tuple[int, ...]]:
    names = [*(f"args[{i}]" for i in range(len(call.args))), *call.kwargs]
    if len(names) != len(call.leaves):
        names = [f"input {i}" for i in range(len(call.leaves))]
    return {name: tuple(leaf.shape) for name, leaf in zip(names, call.leaves, strict=True) if isinstance(leaf, Tensor)}


def _cuda_indices(call: Call) -> list[int]:
    return sorted({leaf.device.index for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.is_cuda})


def _structure(leaf: Any) -> Any:
    return (leaf.dtype, leaf.device, leaf.dim()) if isinstance(leaf, Tensor) else repr(leaf)


def _unit_sizes(call: Call) -> Any:
    """Which of the leading dims are 1, leaf by leaf."""
    return tuple(tuple(size == 1 for size in leaf.shape[:2]) for leaf in call.leaves if isinstance(leaf, Tensor))
