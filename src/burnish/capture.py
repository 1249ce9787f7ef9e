"""nn.Module + example inputs -> `Program`: one flat graph in ATen dialect that serves every batch and sequence size.

Source of the method: `torch.export` in non-strict mode keeps composite operators (linear, layer_norm, ...), the module
path and the source line of every node, and works on every Hugging Face architecture tried; dimensions are left to
`Dim.AUTO`, so that the export itself finds out which of them the model fixes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree

from burnish import huggingface
from burnish._quiet import quiet
from burnish.capture_overhead import little_overhead
from burnish.capture_repeats import repeats_looked_up
from burnish.graph.autocast import autocast_dtypes, has_regions, make_casts_explicit, without_autocast
from burnish.graph.gradients import inline_regions_without_gradients
from burnish.graph.trace import clean
from burnish.record import StepRecord
from burnish.runtime.module import State

_TALKATIVE = (
    "torch.export",
    "torch._export",
    "torch.fx.experimental",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
)


class CaptureError(RuntimeError):
    """The model cannot be captured as one graph. The message is one line that names the place and the reason."""


@dataclass
class Program:
    """One captured model.

    Attributes:
        graph_module: the graph in its present state. Inputs and outputs are flat (pytree leaves); weights are
            `get_attr` nodes with the names they have in the model, and are the model's own tensors, not copies.
        captured: the graph as it was captured. Every node of `graph_module` whose value is also computed by `captured`
            has `meta["origin"]`, the name of that node: this is what verification compares.
        in_spec, out_spec: the pytree structure of `(args, kwargs)` and of the result.
        attention_interface: whether Hugging Face's attention was taken over while capturing.
        autocast: what autocast cast to, by type of device; the graph spells the casts out and runs without it.
        history: one `StepRecord` for each step applied so far.
    """

    graph_module: fx.GraphModule
    captured: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[InputSpec, ...]
    attention_interface: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    history: list[StepRecord] = field(default_factory=list)

    @property
    def computed_in(self) -> torch.dtype | None:
        """The lowest precision that autocast cast to; None where there was none."""
        dtypes = [dtype for _, dtype in self.autocast]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if dtypes else None

    def rejects(self, leaves: Sequence[Any]) -> str | None:
        """Why these input leaves cannot be served by this graph (one line), or None if they can."""
        return reject(self.inputs, leaves)

    def runnable(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Code of this Program as it is to be run: with autocast off, where its casts are spelled out."""
        if not self.autocast:
            return run

        def run_without_autocast(*args: Any) -> Any:
            with without_autocast():
                return run(*args)

        return run_without_autocast

    def first_rows(self, leaves: Sequence[Any], tokens: int) -> list[Any]:
        """The leaves cut to as many samples of the batch as have about `tokens` tokens together; at least two, if there
        are."""
        # A size that stands elsewhere too is a sequence's: a mask of (sequence, sequence) may come before the rest.
        others = {size for spec in self.inputs for size in spec.sizes[1:]}
        batched = [
            bool(spec.sizes) and isinstance(spec.sizes[0], str) and spec.sizes[0] not in others for spec in self.inputs
        ]
        found = [leaf for leaf, cuts in zip(leaves, batched, strict=True) if cuts]
        # Symbols of their own do not make sizes independent: of a loss's targets export says only in an assertion that
        # they are as many as its rows.
        if not found or any(len(leaf) != len(found[0]) for leaf in found):
            return list(leaves)
        length = found[0].shape[1] if found[0].dim() > 1 else 1
        rows = max(2, tokens // max(length, 1))
        return [leaf[:rows] if cuts else leaf for leaf, cuts in zip(leaves, batched, strict=True)]


@dataclass(frozen=True)
class InputSpec:
    """What one flat input must be: for a tensor its dtype, device and sizes (an int is fixed, a str is a free
    symbol)."""

    name: str
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    sizes: tuple[int | str, ...] = ()
    limits: tuple[tuple[int, int | None], ...] = ()
    constant: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.dtype is not None

    def rejects(self, leaf: Any, symbols: dict[str, int]) -> str | None:
        if not self.is_tensor:
            same = type(leaf) is type(self.constant) and leaf == self.constant
            return None if same else f"{self.name} was {self.constant!r} when captured"
        if not isinstance(leaf, Tensor):
            return f"{self.name} was a tensor when captured"
        if leaf.dtype != self.dtype or leaf.device != self.device:
            return f"{self.name} was {self.dtype} on {self.device} when captured"
        if leaf.dim() != len(self.sizes):
            return f"{self.name} had {len(self.sizes)} dims when captured"
        for dim, (size, expected) in enumerate(zip(leaf.shape, self.sizes, strict=True)):
            low, high = self.limits[dim]
            if symbols.setdefault(expected, size) != size if isinstance(expected, str) else expected != size:
                return f"{self.name}: size {size} at dim {dim} does not fit {expected}"
            # A symbol's lower bound of 2 only says that export saw no size of 0 or 1; the runtime checks those sizes by
            # value.
            if (high is not None and size > high) or (low > 2 and size < low) or size == 0:
                return f"{self.name}: size {size} at dim {dim} is outside {low}..{high or 'any'}"
        return None


def reject(inputs: Sequence[InputSpec], leaves: Sequence[Any]) -> str | None:
    """Why a graph of these inputs cannot serve `leaves` (one line), or None if it can."""
    symbols: dict[str, int] = {}
    for spec, leaf in zip(inputs, leaves, strict=True):
        if reason := spec.rejects(leaf, symbols):
            return reason
    return None


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attention_interface: bool = True,
) -> Program:
    """Captures `model` as it computes for `args` and `kwargs`; sizes of these inputs become free where the model allows
    it.

    Args:
        attention_interface: take over Hugging Face's attention, so that masks reach the `attention` Op by their
            meaning.

    Raises:
        CaptureError: one line with the place in the model and the reason.
    """
    started = time.perf_counter()
    kwargs = dict(kwargs or {})
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = _distinct(leaves)
    with little_overhead():
        try:
            exported, took_over = _export(model, pytree.tree_unflatten(_widen(leaves), spec), attention_interface)
        except Exception as error:
            if not any(_is_unit(leaf) for leaf in leaves):
                raise CaptureError(_one_line(error)) from error
            try:  # sizes of 1 that the model insists on: capture them as they are
                exported, took_over = _export(model, pytree.tree_unflatten(leaves, spec), attention_interface)
            except Exception as second:
                raise CaptureError(_one_line(second)) from second
        whole = exported.module(check_guards=False) if _takes_check_guards(exported) else exported.module()
    inline_regions_without_gradients(whole)
    inputs = _input_specs(whole, exported.range_constraints)
    assert exported.call_spec.out_spec is not None
    graph_module = _flat(whole)
    notes = []
    autocast = autocast_dtypes()
    if autocast or has_regions(graph_module):
        try:
            casts = make_casts_explicit(graph_module)
        except ValueError as error:
            raise CaptureError(_one_line(error)) from error
        dtypes = ", ".join(f"{kind} to {str(dtype).removeprefix('torch.')}" for kind, dtype in autocast)
        notes.append(f"autocast {f'of {dtypes}' if dtypes else 'within the model'}: {casts} casts")
    before = len(graph_module.graph.nodes)
    removed = clean(graph_module)
    for node in graph_module.graph.nodes:
        node.meta["origin"] = node.name
    captured = fx.GraphModule(graph_module, copy_graph(graph_module.graph))
    program = Program(graph_module, captured, spec, exported.call_spec.out_spec, inputs, took_over, autocast)
    program.history.append(
        StepRecord(
            "capture",
            nodes_before=before,
            nodes_after=before - removed,
            seconds=time.perf_counter() - started,
            notes=[f"free sizes: {', '.join(program_symbols(program)) or 'none'}", *notes],
        )
    )
    return program


def program_symbols(program: Program) -> list[str]:
    """The free sizes as `name[dim]`, each symbol once, e.g. `["input_ids[0]", "input_ids[1]"]`."""
    first: dict[str, str] = {}
    for spec in program.inputs:
        for dim, size in enumerate(spec.sizes):
            if isinstance(size, str):
                first.setdefault(size, f"{spec.name}[{dim}]")
    return list(first.values())


def _export(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], attention_interface: bool
) -> tuple[torch.export.ExportedProgram, bool]:
    """The exported program, and whether Hugging Face's attention was taken over."""
    args, kwargs = tuple(inputs[0]), inputs[1]

    def free(leaf: Any) -> Any:
        if isinstance(leaf, State):  # whose leaves `torch.export` takes as a list
            return list(map(free, pytree.tree_leaves(leaf)))
        return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None

    free_args, free_kwargs = pytree.tree_map(free, (args, kwargs), is_leaf=lambda value: isinstance(value, State))
    given = frozenset(name for name, leaf in kwargs.items() if leaf is not None)

    def export() -> torch.export.ExportedProgram:
        with _named_keywords(model, args, kwargs):
            # `torch.export` wants one mapping by the names of forward's parameters.
            shapes = dict(inspect.signature(model.forward).bind(*free_args, **free_kwargs).arguments)
            trace = partial(torch.export.export, model, args, kwargs, strict=False, dynamic_shapes=shapes)
            with repeats_looked_up() as repeats:
                try:
                    return trace()
                except huggingface.NotExpressible:
                    raise
                except Exception:
                    if not repeats.found:
                        raise
            return trace()  # what was looked up shall not be to blame

    # With gradients, so that it shows where a model stops them.
    with torch.set_grad_enabled(model.training and torch.is_grad_enabled()), quiet(*_TALKATIVE), _appending():
        if attention_interface:
            with (
                contextlib.suppress(huggingface.NotExpressible),
                huggingface.captured_attention(model, given) as took_over,
            ):
                return export(), took_over
        return export(), False


def _appending() -> contextlib.AbstractContextManager[Any]:
    """Where a KV cache could be among the inputs, nothing is to be written into it."""
    kv_cache = sys.modules.get("burnish.runtime.kv_cache")
    return contextlib.nullcontext() if kv_cache is None else kv_cache.appending()


@contextlib.contextmanager
def _named_keywords(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Within the `with`, what the caller passes through forward's `**kwargs` has parameters of its own: export mixes up
    the free sizes of such inputs otherwise."""
    signature = inspect.signature(model.forward)
    variable = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    extra = signature.bind(*args, **kwargs).arguments.get(variable, {}) if variable is not None else {}
    if not extra:
        yield
        return
    original, patched = model.forward, vars(model).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    kept = [p for p in signature.parameters.values() if p.name != variable]
    setattr(forward, "__signature__", signature.replace(parameters=[*kept, *named]))  # noqa: B010
    model.forward = forward
    try:
        yield
    finally:
        if patched is None:
            del model.forward
        else:
            model.forward = patched


def given_to_export(leaves: Sequence[Any]) -> list[Any]:
    """The flat inputs as `capture` first tries them."""
    return _widen(_distinct(leaves))


def _is_unit(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and 1 in leaf.shape[:2]


def _distinct(leaves: Sequence[Any]) -> list[Any]:
    """A tensor that is given twice is copied: export would make one input of the two."""
    seen: set[int] = set()
    distinct = []
    for leaf in leaves:
        distinct.append(leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return distinct


def _widen(leaves: Sequence[Any]) -> list[Any]:
    """Batch and sequence sizes of 1 become 2, because export would fix them: the first dim of every tensor if all agree
    on 1, and the second of those that look like (batch, sequence[, features]). Not that of a KV cache's next token (its
    keys have four dims): most steps have one, and kernels for it are made for that."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    batch_is_one = all(t.shape[0] == 1 for t in tensors)
    sequence_is_one = all(t.shape[1] == 1 if t.dim() in (2, 3) else t.dim() < 4 for t in tensors)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        repeats = [1] * leaf.dim()
        repeats[0] = 2 if batch_is_one else 1
        if leaf.dim() in (2, 3) and sequence_is_one:
            repeats[1] = 2
        return leaf.repeat(repeats) if 2 in repeats else leaf

    return [widen(leaf) for leaf in leaves]


def _takes_check_guards(exported: torch.export.ExportedProgram) -> bool:
    return "check_guards" in inspect.signature(exported.module).parameters


def _input_specs(graph_module: fx.GraphModule, ranges: Mapping[Any, Any]) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            specs.append(InputSpec(node.target, constant=value))
            continue
        shape = [_known(size) for size in value.shape]
        sizes = tuple(size if isinstance(size, int) else str(size) for size in shape)
        limits = tuple((size, size) if isinstance(size, int) else _limits(size, ranges) for size in shape)
        specs.append(InputSpec(node.target, value.dtype, value.device, sizes, limits))
    return tuple(specs)


def _known(size: int | torch.SymInt) -> int | torch.SymInt:
    """A size that export found to be fixed after it had given it a symbol is that number."""
    return int(size) if isinstance(size, int) or size.node.expr.is_number else size


def _limits(size: torch.SymInt, ranges: Mapping[Any, Any]) -> tuple[int, int | None]:
    bounds = ranges.get(size.node.expr)
    if bounds is None:
        return 2, None
    high = int(bounds.upper) if bounds.upper.is_number and bounds.upper.is_finite and bounds.upper < 2**62 else None
    return int(bounds.lower), high


def _flat(whole: fx.GraphModule) -> fx.GraphModule:
    """Without export's pytree code generation and its check of inputs: the graph then takes and returns flat leaves, in
    pytree order."""
    whole.graph.set_codegen(fx.graph.CodeGen())
    return _make_graph_module(whole, whole.graph)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, mapping)
    copied.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copied


def _one_line(error: BaseException) -> str:
    """The first telling line of an export error, with the place in the user's code where there is one."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    message = next((line.strip() for line in text.splitlines() if line.strip()), "")
    frames = traceback.extract_tb(error.__traceback__)
    own = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
    place = next((frame for frame in reversed(frames) if not frame.filename.startswith(own)), None)
    where = f" ({place.filename}:{place.lineno} in {place.name})" if place else ""
    return f"{type(error).__name__}: {message[:300]}{where}"
