"""`torch.compile(model, backend="burnish")`: the same rewrites in front of Inductor. The way to train.

Dynamo hands over the parts of a model that it can trace. They are raised and fused as in `optimize`, and given to
AOTAutograd and Inductor. Where gradients flow, an Op with passes of its own is one node of the forward and one of the
backward graph, and one that is a composition is its parts, which Inductor fuses with what is around them (see
`burnish.autograd`). Each Op's Impl is chosen for the sizes at hand (see `burnish.compile_choices`).

Weights are inputs of those parts, so what needs packed weights (merged projections) is left out.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config

from burnish.compile_choices import choose_impls
from burnish.compile_trace import regions, trace_for_compile
from burnish.graph.autocast import without_autocast
from burnish.graph.trace import clean
from burnish.op import find_impl
from burnish.ops import embedding_backward
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, GraphPass, Rewrite, apply
from burnish.tuning import Tuner

_NEEDS_PACKING = {"gated_mlp", "parallel linears"}
_OPTIONS = ("burnish.cache", "burnish.impls")


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A torch.compile backend: raises and fuses Dynamo's graph, then compiles it with Inductor.

    Args:
        options: as `torch.compile(..., mode=..., options=...)` gives them: for Inductor, except `"burnish.impls"`, Impl
            names by Op name that are to be used, and `"burnish.cache"`, both as of `burnish.optimize`.

    Raises:
        ValueError: an option of ours that there is not; an Op or Impl that there is not.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    given = dict(options.get("options") or {})
    own = {name: given.pop(name) for name in list(given) if name.startswith("burnish.")}
    if unknown := own.keys() - set(_OPTIONS):
        raise ValueError(f"options: there is no {', '.join(sorted(unknown))}; there are {', '.join(_OPTIONS)}")
    tuner = Tuner(own.get("burnish.cache", "readwrite"), own.get("burnish.impls"))
    for op, impl in tuner.explicit.items():
        find_impl(op, impl)
    if mode := options.get("mode"):
        given = torch._inductor.list_mode_options(mode) | given

    def compile_inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **rest: Any) -> Any:
        choose_impls(graph_module, tuner)
        return compile_fx_inner(graph_module, example_inputs, **rest)

    def compile_with(graph_module: fx.GraphModule) -> Any:
        return compile_fx(
            graph_module,
            list(example_inputs),
            inner_compile=functools.wraps(compile_fx_inner)(compile_inner),
            config_patches=given or None,
            decompositions=_decompositions(),
        )

    # AOTAutograd's cache knows nothing of the Impls; Inductor's own finds their names in the graph.
    with functorch_config.patch(enable_autograd_cache=False):
        try:
            rewritten, _ = rewrite(graph_module, example_inputs)
        except ValueError as error:
            warnings.warn(f"burnish: this part of the model goes to Inductor as it is: {error}", stacklevel=2)
            return compile_with(graph_module)
        with without_autocast():
            return compile_with(rewritten)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's, but for the gradients of tables, which it adds up by atomics: other bits in every run."""
    from torch._inductor.decomposition import select_decomp_table

    found = dict(select_decomp_table())
    theirs = found[torch.ops.aten.embedding_dense_backward.default]

    def in_order(grad: Tensor, ids: Tensor, entries: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
        if scale_grad_by_freq:
            result: Tensor = theirs(grad, ids, entries, padding_idx, scale_grad_by_freq)
            return result
        table: Tensor = embedding_backward(grad, ids, entries)
        if padding_idx < 0:
            return table
        return table.masked_fill((torch.arange(entries, device=table.device) == padding_idx)[:, None], 0)

    found[torch.ops.aten.embedding_dense_backward.default] = in_order
    return found


def rewrite(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[StepRecord]]:
    """Dynamo's graph in ATen dialect with Ops in it, and what was done. It is right with autocast switched off."""
    traced = trace_for_compile(graph_module, example_inputs)
    records = []
    fuse = without_packing(FUSE)
    with without_autocast():
        for graph in regions(traced):
            clean(graph)
            records += [apply("raise", RAISE, graph), apply("fuse", fuse, graph)]
    return traced, records


def without_packing(steps: Sequence[Rewrite | GraphPass]) -> list[Rewrite | GraphPass]:
    """Those that can do without packed weights."""
    return [step for step in steps if step.name not in _NEEDS_PACKING]
