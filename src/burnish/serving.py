"""`Serving`: the default steps of `optimize()`, run at the first call, and what serves the calls after it.

It captures one Program for each structure of inputs (dtype, rank, None-ness, train or eval), and serves every batch and
sequence size from it: for a new size only the Impls are chosen anew.
"""

from __future__ import annotations

import difflib
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from burnish._memory import return_freed_memory
from burnish.ahead import compile_ahead, launches_ahead
from burnish.as_given import AsGiven
from burnish.capture import CaptureError, Program, capture
from burnish.checks import Checks
from burnish.choose import choose_by_measuring, choose_differentiable, choose_for_new_size
from burnish.graph.autocast import autocast_dtypes
from burnish.in_model import ModelContest, choose_in_model
from burnish.parallel.agreement import Agreement
from burnish.prepare import DEFAULT_STEPS, GraphEntry, PlainEntry, Prepared, Preparer
from burnish.program_cache import ProgramCache
from burnish.quantized_weights import Quantization
from burnish.ragged.entry import Find, PackedEntry
from burnish.ragged.nested import NestedCalls
from burnish.ragged.tokens import INPUTS
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, family
from burnish.runtime.cuda_graph import GraphPool, why_not_captured
from burnish.runtime.module import STALE, Call, Entry, OptimizedModule, original_entry
from burnish.served import Served, shapes_of
from burnish.settings import Settings, check_settings
from burnish.tuning import Tuner
from burnish.verify import Verification, random_node

if TYPE_CHECKING:
    from burnish.report import Report
    from burnish.report.data import Explanation
    from burnish.scheduling import Schedule


class Serving:
    """A model, its Programs, and every step that was applied to them.

    Attributes:
        perplexity: before and after quantizing, where `burnish.perplexity_change` measured it.
    """

    def __init__(self, model: nn.Module, settings: Settings | None = None, schedule: Schedule | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        check_settings(self.settings, model)
        self._schedule = schedule
        self._module: weakref.ref[OptimizedModule] | None = None
        self.agreement = Agreement()
        self.agreement.join_model(model)
        self.tuner = Tuner(self.settings.cache, dict(self.settings.impls), self.agreement)
        self.remembered = ProgramCache(self.settings.cache)
        self.served: list[Served] = []
        self.perplexity: tuple[float, float] | None = None
        self._preparer = self._new_preparer()
        self._prepared: list[Prepared] = []
        self._uncapturable: dict[Any, str] = {}
        self._as_given: AsGiven | None = None
        self._graphs = GraphPool()
        self.nested = NestedCalls(model, lambda: self._preparer, self.tuner, self.settings.verify)

    @property
    def program(self) -> Program:
        """The Program of the first captured structure. ValueError before the first call."""
        if not self._prepared:
            raise ValueError(
                "nothing is captured yet: call the optimized model once, or give optimize() example inputs"
            )
        return self._prepared[0].program

    @property
    def programs(self) -> list[Program]:
        """All Programs, in the order in which they were captured."""
        return [prepared.program for prepared in self._prepared]

    @property
    def history(self) -> list[StepRecord]:
        """Every step of every Program, in order."""
        return [record for program in self.programs for record in program.history]

    @property
    def verifications(self) -> list[Verification]:
        """What was verified, for each Program that was."""
        return [prepared.verification for prepared in self._prepared if prepared.verification is not None]

    @property
    def quantizations(self) -> list[Quantization]:
        """What was quantized, for each Program."""
        return [prepared.quantization for prepared in self._prepared if prepared.quantization is not None]

    @property
    def schedule(self) -> Schedule:
        """The Schedule that these steps are of."""
        if self._schedule is None:
            from burnish.scheduling import Schedule

            self._schedule = Schedule.of(self)
        return self._schedule

    def build(self) -> OptimizedModule:
        """The model as it is served."""
        module = OptimizedModule(self.model, self)
        self._module = weakref.ref(module)
        return module

    def leave_out(self, name: str) -> None:
        """Goes on without a default step or a rewrite: the next calls are captured, tuned and verified anew. ValueError
        where there is none of that name."""
        rewrites = [*self.settings.rewrites, *RAISE, *FUSE]
        names = dict.fromkeys([*DEFAULT_STEPS, *(part for each in rewrites for part in (family(each.name), each.name))])
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or [*DEFAULT_STEPS]
            raise ValueError(f"undo: there is no default step and no rewrite {name!r}; there are {', '.join(near)}")
        self.settings = replace(self.settings, without=(*self.settings.without, name))
        keeps_layout, self._preparer = self._preparer.keeps_layout, self._new_preparer()
        self._preparer.keeps_layout = keeps_layout
        self._forget_entries()

    def _forget_entries(self) -> None:
        module = self._module and self._module()
        (module or self).forget()

    def _new_preparer(self) -> Preparer:
        settings = self.settings
        return Preparer(
            self.model, self.tuner, settings.quantize, settings.rewrites, settings.without, settings.padding
        )

    def report(self, explanation: Explanation | None = None) -> Report:
        """What was done, and (see `OptimizedModule.report`) what it costs."""
        from burnish.report import Report

        return Report(self, explanation)

    def prepared_for(self, call: Call) -> Prepared | None:
        """What serves calls like this one; None where nothing was prepared for them, or the weights have moved."""
        spec = call.structure()
        if any(prepared.places.read() is None for prepared in self._prepared):
            return None
        for prepared in self._prepared:
            program = prepared.program
            same_mode = prepared.training == self.model.training and program.autocast == autocast_dtypes()
            if program.in_spec == spec and same_mode and not program.rejects(call.leaves):
                return prepared
        return None

    def served_for(self, call: Call) -> Served | None:
        """How calls of these sizes are served; None before the first."""
        shapes = shapes_of(call)
        return next((served for served in reversed(self.served) if served.shapes == shapes), None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy (or what is unpickled) starts afresh, with the same settings."""
        return type(self), (self.model, self.settings)

    # --- what the OptimizedModule asks for ------------------------------------------------------------

    def entry(self, call: Call, differentiable: bool) -> tuple[Entry, Any]:
        """The entry for one signature, and this call's result if it came by the way (STALE if not). Captures, rewrites,
        tunes and verifies where that has not happened yet."""
        started = time.perf_counter()
        if self.model.training and not self._preparer.keeps_layout:  # from now on: see `AsGiven.restore`
            self._preparer.keeps_layout = True
            if self._as_given is not None and self._as_given.restore():
                self._forget_entries()
        served, checks, result = Served(shapes_of(call)), Checks(self.model, call, self.agreement), STALE
        programs = len(self._prepared)
        with self._making(call):
            prepared, served.kept_original = self._prepare(call, checks, served)
            if prepared is None:
                entry = original_entry(self.model)
            elif prepared.packed is not None:
                entry = self._packed_entry(prepared, call, checks, served, differentiable)
            else:
                served.padding = prepared.not_packed and f"padding is kept: {prepared.not_packed}"
                entry, result = self._entry_of(prepared, call, checks, served, differentiable)
        if len(self._prepared) != programs:  # what the first call measured and verified with
            return_freed_memory()
        served.seconds = time.perf_counter() - started
        self.served.append(served)
        self.tuner.save()
        return entry, result

    @contextmanager
    def _making(self, call: Call) -> Iterator[None]:
        """Within the `with`, entries for calls like this one may be made."""
        devices = _cuda_indices(call)
        # A model with dropout draws what it would draw anyway; a graph in the making needs no code; and graphs are
        # captured, and timed, on the current device.
        on_device = torch.cuda.device(devices[0]) if devices else nullcontext()
        with torch.random.fork_rng(devices), _use_lazy_graph_module(True), on_device:
            yield

    def _entry_of(
        self, prepared: Prepared, call: Call, checks: Checks, served: Served, differentiable: bool
    ) -> tuple[Entry, Any]:
        if differentiable:
            return self._differentiable_entry(prepared, call, checks, served), STALE
        if prepared.verified:
            return self._entry_for_new_size(prepared, call, checks, served)
        return self._first_entry(prepared, call, checks, served), STALE

    def _packed_entry(
        self, prepared: Prepared, call: Call, checks: Checks, served: Served, differentiable: bool
    ) -> Entry:
        """Without padding; with it where that would compute something else."""
        packed, kind = prepared.packed, "differentiable" if differentiable else "inference"
        assert packed is not None

        def padded() -> Entry:
            with self._making(call):
                return self._entry_of(prepared, call, checks, served, differentiable)[0]

        records = iter([served])  # of the first number of tokens; the others are served likewise

        def make(inner: Call, find: Find | None) -> Entry:
            with self._making(inner):
                record = next(records, Served(served.shapes))
                return self._entry_of_tokens(packed.prepared, inner, record, differentiable, find)

        first = None if prepared.verified or differentiable else padded()
        graphs = None if differentiable else self._graphs
        entry = PackedEntry(prepared, padded if first is None else lambda: first, make, graphs)
        if self.agreement.is_shared:
            prepared.packed, prepared.not_packed = None, "the model is divided among ranks"
            served.padding = f"padding is kept: {prepared.not_packed}"
            return padded() if first is None else first
        with torch.set_grad_enabled(differentiable):
            entry(call)  # its sizes are what Impls are measured on
        assert entry.tokens is not None
        real, places = entry.tokens
        served.padding = f"{real} of {places} tokens are real"
        if entry.not_packed:
            served.padding += f", padding is kept: {entry.not_packed}"
        if self.settings.verify and kind not in packed.checked:
            verdict = checks.packed_is_right(prepared, entry, kind)
            if verdict is not None and not verdict.ok:
                prepared.packed, prepared.not_packed = (
                    None,
                    f"real tokens differ from the padded ones: {verdict.reason}",
                )
            packed.checked.add(kind)
        if prepared.packed is None:
            served.padding = f"padding is kept: {prepared.not_packed}"
            return padded() if first is None else first
        if first is not None:
            served.kept_original, served.optimized_us = None, checks.compare(entry).optimized_us
        return entry

    def _entry_of_tokens(
        self, packed: Prepared, inner: Call, served: Served, differentiable: bool, find: Find | None
    ) -> Entry:
        """The packed Program's entry for one number of tokens, which begins with `find`."""
        if differentiable:
            executable, chosen = choose_differentiable(packed, self.model, inner, self.tuner)
            return packed.bind(chosen.functions, self.model, executable)
        if packed.verified:
            chosen = choose_for_new_size(packed, inner, self.tuner)
        else:
            chosen, seen = choose_by_measuring(packed, inner, self.tuner)
            if not self.model.training and self._why_not_captured(packed, inner) is None:
                choose_in_model(
                    packed, chosen, seen, self.tuner, ModelContest(packed, self.model, inner, self.agreement)
                )
            packed.verified = True
        self.tuner.save()
        served.choices = chosen.choices
        plain = packed.bind(chosen.functions, self.model)
        plain = plain if find is None else plain.after(find)
        # By a kernel of ours they are written to the same places in every call.
        fixed = () if inner.leaves[-1] is None else range(len(inner.leaves))[-len(INPUTS) :]
        return plain if self.model.training else self._captured(packed, plain, inner, served, fixed)

    def forget(self) -> None:
        """Drops every Program: the weights have moved (`.to()`, a parameter replaced,
        `load_state_dict(assign=True)`), or one that was quantized, or a mask that was looked at, has changed."""
        self._graphs.clear()
        self._prepared.clear()
        self.nested.forget()
        self._preparer.quantized.forget()
        self._uncapturable.clear()

    def _prepare(self, call: Call, checks: Checks, served: Served) -> tuple[Prepared | None, str | None]:
        """What can serve the call, or why nothing can."""
        if any(prepared.places.read() is None for prepared in self._prepared):
            self.forget()
        if (known := self.prepared_for(call)) is not None:
            return known, None
        structure = (str(call.structure()), self.model.training, autocast_dtypes(), *map(_structure, call.leaves))
        if structure in self._uncapturable:
            return None, self._uncapturable[structure]
        try:
            program = self._capture(call, checks)
            self._as_given = self._as_given or AsGiven(self.model)
            if not self.model.training:  # now, while the weights are still stored as the user stored them
                served.original_us = checks.time_original()
            prepared = self._preparer.prepare(program)
        except CaptureError as error:
            with torch.no_grad():
                self.model(*call.args, **call.kwargs)  # a call that is wrong raises the model's own error here
            self._uncapturable[structure] = str(error)
            return None, str(error)
        self._prepared.append(prepared)
        return prepared, None

    def _capture(self, call: Call, checks: Checks) -> Program:
        """A Program that computes what the model computes, on this call's inputs at least: an earlier process's, or a
        new one."""
        remembered = self.remembered.at(self.model, call)
        if (earlier := remembered.read()) is not None:
            if checks.remembered_is_right(earlier):
                return earlier
            remembered.forget()
        reason = None
        for attention_interface in (True, False):
            program = capture(self.model, call.args, call.kwargs, attention_interface=attention_interface)
            self.agreement.join_graph(program.captured.graph)
            verdict = checks.capture_is_right(program) if self.settings.verify else None
            if verdict is None or verdict.ok:
                remembered.write(program)
                return program
            reason = verdict.reason
            if not program.attention_interface:
                break
        raise CaptureError(f"the captured graph computes something else: {reason}")

    def _first_entry(self, prepared: Prepared, call: Call, checks: Checks, served: Served) -> Entry:
        chosen, seen = choose_by_measuring(prepared, call, self.tuner)
        if not self.model.training and self._why_not_captured(prepared, call) is None:
            contest = ModelContest(prepared, self.model, call, self.agreement)
            choose_in_model(prepared, chosen, seen, self.tuner, contest)
        ahead = launches_ahead(prepared, seen, self.tuner)
        del seen  # the activations
        if self.settings.verify:
            chosen = checks.verify_values(prepared, chosen, self.tuner)
            checks.measure_quantization(prepared)
        prepared.verified = True
        served.choices = chosen.choices
        plain = prepared.bind(chosen.functions, self.model)
        entry = self._unless_wrong(prepared, plain, checks, served, "inference")
        if served.kept_original or self.model.training:
            return entry
        entry = self._captured(prepared, plain, call, served)
        compared = checks.compare(entry)
        asked = self.settings.impls or self.settings.quantize
        if compared.is_slower and not asked:
            compared = checks.compare(entry)  # of a large model it is one call of each, and something else may have run
        served.original_us, served.optimized_us = compared.original_us, compared.optimized_us
        if compared.is_slower and not asked:
            served.kept_original = "no Impl beat the original"
            return original_entry(self.model)
        compile_ahead(ahead)
        return entry

    def _entry_for_new_size(self, prepared: Prepared, call: Call, checks: Checks, served: Served) -> tuple[Entry, Any]:
        chosen = choose_for_new_size(prepared, call, self.tuner)
        served.choices = chosen.choices
        plain = prepared.bind(chosen.functions, self.model)
        entry = self._unless_wrong(prepared, plain, checks, served, "inference")
        if not served.kept_original and not self.model.training:
            entry = self._captured(prepared, plain, call, served)
        # Random numbers drawn in here are drawn again afterwards: they must not reach the caller.
        if served.kept_original or chosen.outputs is None or random_node(prepared.program.captured.graph):
            return entry, STALE
        return entry, prepared.program.out_spec.unflatten(chosen.outputs)

    def _captured(
        self, prepared: Prepared, plain: PlainEntry, call: Call, served: Served, fixed: Sequence[int] = ()
    ) -> Entry:
        """The entry as a CUDA graph, where the device, the inputs and the settings allow one. `fixed`: see
        `GraphEntry`."""
        reason = self._why_not_captured(prepared, call)
        if reason is None:
            static, shared = self.settings.static_outputs, self.agreement.is_shared
            entry = GraphEntry(plain, self._graphs, call, static, shared, fixed)
            reason = entry.check(call)
            if reason is None:
                served.cuda_graph = True
                return entry
        served.not_captured = reason or None
        return plain

    def _why_not_captured(self, prepared: Prepared, call: Call) -> str | None:
        """Why no CUDA graph may serve the call; empty where there is none to be expected."""
        if self.settings.cuda_graphs == "never" or not any(isinstance(t, Tensor) and t.is_cuda for t in call.leaves):
            return ""
        if name := random_node(prepared.program.captured.graph):
            return f"{name} is random"
        return why_not_captured(call.leaves)

    def _differentiable_entry(self, prepared: Prepared, call: Call, checks: Checks, served: Served) -> Entry:
        """On CUDA by Inductor. On the CPU that takes half a minute to gain little (BERT-base: 1.0 to 1.05x): there the
        Ops run as they are."""
        if self.model.training and _cuda_indices(call):
            prepared.compiled = prepared.compiled or self._preparer.compile(prepared)
            return self._unless_wrong(prepared, prepared.compiled, checks, served, "differentiable")
        executable, chosen = choose_differentiable(prepared, self.model, call, self.tuner)
        served.choices = chosen.choices
        entry = prepared.bind(chosen.functions, self.model, executable)
        return self._unless_wrong(prepared, entry, checks, served, "differentiable")

    def _unless_wrong(self, prepared: Prepared, entry: Entry, checks: Checks, served: Served, kind: str) -> Entry:
        """The original where the outputs as a whole are not right."""
        verdict = checks.outputs_are_right(prepared, entry, kind) if self.settings.verify else None
        if verdict is None or verdict.ok:
            return entry
        whose = "the original's" if self.settings.quantize is None else "what they are to be"
        served.kept_original = f"the outputs differ from {whose}: {verdict.reason}"
        return original_entry(self.model)


def _cuda_indices(call: Call) -> list[int]:
    return sorted({leaf.device.index for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.is_cuda})


def _structure(leaf: Any) -> Any:
    return (leaf.dtype, leaf.device, leaf.dim()) if isinstance(leaf, Tensor) else repr(leaf)
