"""`torch.compile(model, backend="burnish")`: the same rewrites in front of Inductor. The way to train.

Dynamo hands over the parts of a model that it can trace. They are raised and fused as in `optimize`, and given to
AOTAutograd and Inductor. Where gradients flow, an Op with passes of its own is one node of the forward and one of the
backward graph, and one that is a composition is its parts, which Inductor fuses with what is around them (see
`burnish.autograd`). Each Op's Impl is chosen for the sizes at hand (see `burnish.inductor.choices`).

Weights are inputs of those parts, so what needs packed weights (merged projections) is left out.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config

from burnish.graph.autocast import without_autocast
from burnish.graph.trace import clean
from burnish.inductor.attention import pack_gradients
from burnish.inductor.choices import choose_impls
from burnish.inductor.decompositions import decompositions, expand_gelu
from burnish.inductor.gelu import undo_gelu_products, use_gelu_products
from burnish.inductor.norms import Statistics, use_norms
from burnish.inductor.products import widen_products
from burnish.inductor.tables import add_tables
from burnish.inductor.trace import regions, trace_for_compile
from burnish.op import find_impl
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, GraphPass, Rewrite, apply
from burnish.tuning import Tuner

_NEEDS_PACKING = {"gated_mlp", "parallel linears"}
_OPTIONS = ("burnish.cache", "burnish.impls", "burnish.recompute")


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A torch.compile backend: raises and fuses Dynamo's graph, then compiles it with Inductor.

    Args:
        options: as `torch.compile(..., mode=..., options=...)` gives them: for Inductor, except `"burnish.impls"`, Impl
            names by Op name that are to be used, and `"burnish.cache"`, both as of `burnish.optimize`, and
            `"burnish.recompute"`: whether the backward pass computes activations and norms again, from what is kept
            anyway, rather than have them kept as inputs of the products that follow (default True).

    Raises:
        ValueError: an option of ours that there is not, or a value of one; an Op or Impl that there is not.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    given = dict(options.get("options") or {})
    own = {name: given.pop(name) for name in list(given) if name.startswith("burnish.")}
    if unknown := own.keys() - set(_OPTIONS):
        raise ValueError(f"options: there is no {', '.join(sorted(unknown))}; there are {', '.join(_OPTIONS)}")
    recompute = own.get("burnish.recompute", True)
    if not isinstance(recompute, bool):
        raise ValueError(f"options: burnish.recompute is {recompute!r}; it must be True or False")
    tuner = Tuner(own.get("burnish.cache", "readwrite"), own.get("burnish.impls"))
    for op, impl in tuner.explicit.items():
        find_impl(op, impl)
    if mode := options.get("mode"):
        given = torch._inductor.list_mode_options(mode) | given

    statistics: Statistics = {}

    def compile_inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **rest: Any) -> Any:
        use_norms(graph_module, statistics)
        pack_gradients(graph_module)
        add_tables(graph_module)
        use_gelu_products(graph_module)
        choose_impls(graph_module, tuner)
        undo_gelu_products(graph_module)
        expand_gelu(graph_module)
        widen_products(graph_module)
        return compile_fx_inner(graph_module, example_inputs, **rest)

    def compile_with(graph_module: fx.GraphModule) -> Any:
        return compile_fx(
            graph_module,
            list(example_inputs),
            inner_compile=functools.wraps(compile_fx_inner)(compile_inner),
            config_patches=given or None,
            decompositions=decompositions(),
        )

    # AOTAutograd's cache knows nothing of the Impls; Inductor's own finds their names in the graph.
    with functorch_config.patch(enable_autograd_cache=False, ban_recompute_materialized_backward=not recompute):
        try:
            rewritten, _ = rewrite(graph_module, example_inputs)
        except ValueError as error:
            warnings.warn(f"burnish: this part of the model goes to Inductor as it is: {error}", stacklevel=2)
            return compile_with(graph_module)
        with without_autocast():
            return compile_with(rewritten)


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
