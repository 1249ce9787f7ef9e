"""`Prepared`: a captured Program after raising, fusing and packing, with the code generated from it, ready to be
bound."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish._memory import return_freed_memory
from burnish.capture import Program
from burnish.inductor.backend import backend, without_packing
from burnish.lower import Executable
from burnish.ops import linear
from burnish.outputs import unflattener
from burnish.pack import Pack, pack
from burnish.parallel.graphs import drop_copies, has_copies
from burnish.places import Places, WeightPlace, find_weight
from burnish.quantize import Kind
from burnish.quantized_weights import Quantization, QuantizedWeights, check_kind
from burnish.ragged.live import OFFSETS, told
from burnish.ragged.masks import Refused
from burnish.ragged.unpad import Unpadded, unpad
from burnish.record import NearMiss, StepRecord
from burnish.rewrites import FUSE, RAISE, GraphPass, Rewrite, apply, family, own
from burnish.rewrites.quantize import passes_after, passes_before, quantize
from burnish.rewrites.raise_causal import LOOKED_AT
from burnish.runtime.cuda_graph import CapturedCall, GraphPool
from burnish.runtime.module import STALE, Call
from burnish.tuning import Tuner
from burnish.verify import Verification, check_outputs

DEFAULT_STEPS = ("raise", "fuse", "pack")


class PlainEntry:
    """Runs bound code on the weights where they are; STALE once one has moved."""

    def __init__(
        self, run: Callable[..., Sequence[Any]], executable: Executable, places: Places, out_spec: pytree.TreeSpec
    ) -> None:
        self.places, self.unflatten = places, unflattener(out_spec)
        self._run, self._count = run, len(executable.weights)
        self.donated, self.borrowed = executable.donated, executable.borrowed

    def __call__(self, call: Call) -> Any:
        weights = self.places.read()
        return STALE if weights is None else self.unflatten(self._run(weights[: self._count], call.leaves))

    def after(self, first: Callable[[Sequence[Any]], object]) -> PlainEntry:
        """The same entry, but for `first`, which is called on a call's leaves before them."""
        entry, run = copy.copy(self), self._run

        def both(weights: Sequence[Any], leaves: Sequence[Any]) -> Sequence[Any]:
            first(leaves)
            return run(weights, leaves)

        entry._run = both
        return entry

    def run(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs. RuntimeError when a weight has moved."""
        weights = self.places.read()
        if weights is None:
            raise RuntimeError("a weight was moved")
        return self._run(weights[: self._count], leaves)


class GraphEntry:
    """The same as a CUDA graph, captured at its first call. What cannot be captured runs as plain code.

    Args:
        fixed: which of the leaves lie at the same addresses in every call.

    Attributes:
        refused: why there is no graph, or None.
    """

    def __init__(
        self,
        plain: PlainEntry,
        pool: GraphPool,
        call: Call,
        static_outputs: bool,
        on_buffers: bool = False,
        fixed: Collection[int] = (),
    ) -> None:
        self.plain = plain
        self.refused: str | None = None
        self._weights: list[Tensor] = []
        self._captured = CapturedCall(
            pool,
            plain.run,
            call.leaves,
            static_outputs,
            donated={*plain.donated, *fixed},
            borrowed=plain.borrowed,
            on_buffers=on_buffers,
        )

    def __call__(self, call: Call) -> Any:
        if self.refused is not None:
            return self.plain(call)
        if not self._captured.is_captured:
            weights = self.plain.places.read()
            if weights is None:
                return STALE
            # The graph knows addresses only: what lies there must live as long as it.
            self._weights = [weight.detach() for weight in weights]
        try:
            outputs = self._captured(call.leaves)
        except RuntimeError as error:
            if self._captured.is_captured:  # a replay that fails is an error of the device
                raise
            self.refused = f"it cannot be captured: {str(error).splitlines()[0]}"
            return self.plain(call)
        # To check 200 weights takes the host 20 us: the device computes meanwhile.
        return STALE if self.plain.places.read() is None else self.plain.unflatten(outputs)

    def check(self, call: Call) -> str | None:
        """Captures, and says why the graph cannot serve: it cannot be captured, or computes something else."""
        plain = pytree.tree_leaves(self.plain(call))  # first: to load a kernel is nothing that a graph can hold
        outputs = pytree.tree_leaves(self(call))
        if self.refused is not None:
            return self.refused
        verdict = check_outputs(outputs, plain, plain)
        if not verdict.ok:
            self.refused = f"its replay differs from the calls that were captured: {verdict.reason}"
        return self.refused


@dataclass
class Prepared:
    """A Program with the code generated from it.

    Attributes:
        training: the mode in which the model was captured.
        executable: the code on packed, or quantized, weights.
        differentiable: the graph as it was before packing, for gradients that have to reach the model's own parameters;
            of float weights.
        captured: the graph as it was captured. `program.captured` is the same, but on dequantized weights where some
            are quantized.
        members: the parameters that became views of packed weights.
        looked_at: the buffers whose values decided something, each with the version that was seen.
        places: all weights, to be told when one has been moved.
        verified: whether the first call's checks are done; `verification` what they found.
        rejected: slots whose Impl failed verification, and why.
        checked: kinds of calls whose outputs were compared as a whole.
        compiled: what trains it, compiled by Inductor for all sizes, once there is such a thing.
        quantization: what was quantized; None where it was not asked for.
        packed: the same Program without padding, where that was asked for; `not_packed` says why there is none.
    """

    program: Program
    training: bool
    executable: Executable
    differentiable: fx.GraphModule
    captured: fx.GraphModule
    members: list[WeightPlace]
    looked_at: list[tuple[WeightPlace, int]]
    places: Places
    quantization: Quantization | None = None
    packed: Packed | None = None
    not_packed: str | None = None
    verified: bool = False
    verification: Verification | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)
    compiled: PlainEntry | None = None

    def bind(
        self, functions: Mapping[str, Callable[..., Any]], model: nn.Module, executable: Executable | None = None
    ) -> PlainEntry:
        """An entry that runs the code with these callables in its slots."""
        # A graph with gradients reads the float weights: they change all the time.
        copied = self.quantization.sources if self.quantization is not None and executable is None else ()
        executable = executable or self.executable
        places = Places(model, (*executable.weights, *self.members), (*copied, *self.looked_at))
        return PlainEntry(self.program.runnable(executable.bind(functions)), executable, places, self.program.out_spec)

    def regenerate(self, model: nn.Module) -> None:
        """New code after the graph was changed: what verification undid is gone from the differentiable graph too."""
        self.executable = Executable(self.program.graph_module, model)
        self.differentiable = _copied(self.captured)
        self.rejected.clear()


@dataclass
class Packed:
    """A Program on a batch's real tokens alone, and what was found out on the way there.

    Attributes:
        of_all_places: whether its code has one size for all masks of a shape, and is told how many tokens are real.
        checked: kinds of calls ("inference", "differentiable") whose outputs were compared with the padded ones.
    """

    prepared: Prepared
    unpadded: Unpadded
    of_all_places: bool = False
    checked: set[str] = field(default_factory=set)


class Preparer:
    """Rewrites (where `rewrites` are given), raises, fuses, quantizes (where `kind` is given) and packs Programs of one
    model. Remembers how each weight is to be stored, and what was quantized, so that two Programs agree.

    Attributes:
        keeps_layout: whether no weight may be stored in another order, because the model is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        tuner: Tuner,
        kind: Kind | None = None,
        rewrites: Sequence[Rewrite] = (),
        without: Sequence[str] = (),
        padding: str = "keep",
    ) -> None:
        self.model, self.tuner, self.kind, self.rewrites, self.without = model, tuner, kind, rewrites, without
        self.padding = padding
        self.keeps_layout = False
        self.quantized = QuantizedWeights(model)
        self._transposed: dict[tuple[str, ...], bool] = {}

    def prepare(self, program: Program) -> Prepared:
        """Runs the default steps on `program`, each with its record in the Program's history."""
        graph_module = program.graph_module
        captured = program.captured
        for_inference = not self.model.training and has_copies(graph_module.graph)
        if for_inference:
            drop_copies(graph_module)
        if self.rewrites:
            program.history.append(apply("rewrite", own(self._wanted("rewrite", self.rewrites)), graph_module))
        program.history.append(apply("raise", self._wanted("raise", RAISE), graph_module))
        unpadded = self._unpad(program) if self.padding == "remove" else None
        prepared = self._finish(program, captured, for_inference)
        if isinstance(unpadded, Unpadded):
            prepared.packed = self._pack_tokens(program, unpadded, for_inference)
        prepared.not_packed = unpadded if isinstance(unpadded, str) else None
        return prepared

    def prepare_nested(self, program: Program, nested: Sequence[str]) -> Packed:
        """A Program that was captured padded, on the values of the inputs of these names. Refused where that cannot
        be."""
        for_inference = not self.model.training and has_copies(program.graph_module.graph)
        if for_inference:
            drop_copies(program.graph_module)
        if self.rewrites:
            apply("rewrite", own(self._wanted("rewrite", self.rewrites)), program.graph_module)
        apply("raise", self._wanted("raise", RAISE), program.graph_module)
        unpadded = unpad(program.graph_module, nested)
        return self._pack_tokens(program, unpadded, for_inference)

    def _pack_tokens(self, program: Program, unpadded: Unpadded, for_inference: bool) -> Packed:
        graph_module = unpadded.graph_module
        of_tokens = replace(program, graph_module=graph_module, captured=_copied(graph_module), history=[])
        prepared = self._finish(of_tokens, of_tokens.captured, for_inference)
        # Windows count distances between tokens: whether these have gaps has to be known before.
        of_all_places = unpadded.mask is not None and not unpadded.windowed
        nodes = told(graph_module.graph, self.tuner.explicit) if of_all_places else []
        if nodes:
            prepared.executable = Executable(graph_module, self.model, nodes, OFFSETS)
        return Packed(prepared, unpadded, bool(nodes))

    def _unpad(self, program: Program) -> Unpadded | str:
        """The raised graph without padding, or why it cannot be had; with a record in the Program's history."""
        started = time.perf_counter()
        record = StepRecord("unpad", nodes_before=len(program.graph_module.graph.nodes))
        found: Unpadded | str
        try:
            found = made = unpad(program.graph_module)
            record.matches = {"attention without padding": made.attentions}
            record.nodes_after = len(made.graph_module.graph.nodes)
        except Refused as error:
            found = str(error)
            node, _, reason = found.partition(": ")
            named = bool(reason) and node.isidentifier()
            record.near_misses = [NearMiss("padding", reason if named else found, (node,) if named else ())]
            record.nodes_after = record.nodes_before
        record.seconds = time.perf_counter() - started
        program.history.append(record)
        return found

    def _finish(self, program: Program, captured: fx.GraphModule, for_inference: bool) -> Prepared:
        """A raised Program fused, quantized and packed."""
        graph_module, quantization = program.graph_module, None
        fuse = self._wanted("fuse", FUSE)
        program.history.append(apply("fuse", fuse if self.kind is None else passes_before(fuse), graph_module))
        differentiable = _copied(captured if for_inference else graph_module)
        if self.kind is not None:
            quantization = self._quantize(program, self.kind)
        packs: list[Pack] = []
        if "pack" not in self.without:
            packs, record = pack(graph_module, self.model, self._wants_transposed, self.keeps_layout)
            program.history.append(record)
        return_freed_memory()
        members = [find_weight((self.model,), member.path) for packed in packs for member in packed.members]
        executable = Executable(graph_module, self.model)
        copied = quantization.sources if quantization is not None else ()
        looked_at = self._looked_at(graph_module)
        places = Places(self.model, (*executable.weights, *members), (*copied, *looked_at))
        mode = self.model.training
        return Prepared(program, mode, executable, differentiable, captured, members, looked_at, places, quantization)

    def compile(self, prepared: Prepared) -> PlainEntry:
        """What trains the Program by Inductor, for all sizes: the same rewrites as of `torch.compile` with this
        backend, on the model's own parameters. Compiled at its first call, and once more at the first other size."""
        graph = _copied(prepared.captured)
        if self.rewrites:
            apply("rewrite", own(self._wanted("rewrite", self.rewrites)), graph)
        apply("raise", self._wanted("raise", RAISE), graph)
        apply("fuse", without_packing(self._wanted("fuse", FUSE)), graph)
        executable = Executable(graph, self.model)
        run = executable.bind({slot.name: slot.op.overload for slot in executable.slots})
        options: dict[str, Any] = {"burnish.impls": self.tuner.explicit, "burnish.cache": self.tuner.cache}
        compiled: Any = torch.compile(run, backend=backend, options=options)
        places, program = Places(self.model, executable.weights), prepared.program
        return PlainEntry(program.runnable(compiled), executable, places, program.out_spec)

    def _wanted(self, step: str, rewrites: Sequence[Rewrite | GraphPass]) -> list[Rewrite | GraphPass]:
        if step in self.without:
            return []
        return [each for each in rewrites if each.name not in self.without and family(each.name) not in self.without]

    def _quantize(self, program: Program, kind: Kind) -> Quantization:
        check_kind(kind, self.model)  # it may have moved to another device
        done, program.captured, record = quantize(program.graph_module, program.captured, self.quantized, kind)
        program.history.append(record)
        rest = apply("fuse", passes_after(self._wanted("fuse", FUSE)), program.graph_module)
        if rest.matches:
            program.history.append(rest)
        return done

    def _looked_at(self, graph_module: fx.GraphModule) -> list[tuple[WeightPlace, int]]:
        seen: dict[str, int] = graph_module.meta.get(LOOKED_AT, {})
        return [(find_weight((self.model, graph_module), path), version) for path, version in seen.items()]

    def _wants_transposed(self, weight: fx.Node) -> bool:
        """Whether products read this weight faster when it is stored (K, N): measured on its first reader's sizes."""
        key = (str(weight.target), *(str(source.target) for source in weight.all_input_nodes))
        if self.keeps_layout:
            return False
        if key not in self._transposed:
            self._transposed[key] = self._measure_transposed(weight)
        return self._transposed[key]

    def _measure_transposed(self, weight: fx.Node) -> bool:
        value: Tensor = weight.meta["val"]
        reader = next((user for user in weight.users if user.target is linear.overload), None)
        if value.device.type != "cpu" or value.shape[0] < 16:
            return False
        rows = _hinted_rows(reader.args[0].meta["val"]) if reader is not None else 128  # type: ignore[union-attr]
        return self.tuner.prefers_transposed(linear, rows, value, budget_us=self.tuner.FIRST_BUDGET_US)


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def _hinted_rows(value: Tensor) -> int:
    """How many rows this activation had when captured."""
    rows = 1
    for size in value.shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint or 1
    return min(rows, 4096)
