"""Dynamo's graph in ATen dialect, composite operators kept, with its autocast spelled out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from burnish._quiet import quiet
from burnish.graph.autocast import autocast_dtypes, make_casts_explicit
from burnish.graph.clean import NEEDS_GRADIENT
from burnish.graph.gradients import stop_gradients

_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
_RECOMPUTED = "_checkpoint_context_fn"  # in the meta of a region's graph, where Dynamo leaves `context_fn`


def trace_for_compile(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Dynamo's graph as the rewrites want it. It is right with autocast switched off, whatever holds now.

    Regions under activation checkpointing stay graphs of their own, which `regions` gives.
    ValueError where it cannot be seen what autocast does.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(given) if isinstance(given, Tensor) else given for given in example_inputs]
    else:
        fakes = [_fake(given, mode, context) for given in example_inputs]
    with mode:
        with _regions_say_what_they_recompute(graph_module):
            traced = make_fx(graph_module, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
        for region in regions(traced)[1:]:
            if region.meta.get(_RECOMPUTED) is _ALL:
                del region.meta[_RECOMPUTED]
        enters = any(node.target is autocast_mode._enter_autocast for node in traced.graph.nodes)
        if enters or autocast_dtypes():
            make_casts_explicit(traced, fakes)
    _keep_casts_of_weights(traced, fakes)
    for number, region in enumerate(regions(traced)):
        _say_what_needs_gradients(region, None if number else fakes)
        stop_gradients(region)
    _say_where_inputs_come_from(traced, graph_module)
    return traced


def _keep_casts_of_weights(traced: fx.GraphModule, fakes: Sequence[Any]) -> None:
    """For the backward pass, which would make them again from the weights: GPT-2's are 170 MB, and 0.17 of the 25 ms of
    a step (H200)."""
    for node, given in zip(traced.graph.find_nodes(op="placeholder"), fakes, strict=True):
        if isinstance(given, Tensor) and given.requires_grad and given.is_leaf:
            for cast in (user for user in node.users if user.target in _CASTS):
                cast.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _say_what_needs_gradients(graph_module: fx.GraphModule, fakes: Sequence[Any] | None) -> None:
    """Else a detach would be taken for nothing. Of the inputs of a checkpointed region, without `fakes`, all may."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for place, node in enumerate(placeholders):
        given = None if fakes is None else fakes[place]
        node.meta[NEEDS_GRADIENT] = fakes is None or (isinstance(given, Tensor) and given.requires_grad)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta[NEEDS_GRADIENT] = True


def _say_where_inputs_come_from(traced: fx.GraphModule, graph_module: fx.GraphModule) -> None:
    """What Dynamo tells AOTAutograd of each input: which ones stay where they are. CUDA graphs copy all others at every
    replay, of GPT-2 498 MB of weights, 0.43 ms of a training step."""
    sources = getattr(graph_module, "_param_name_to_source", None)
    pairs = list(zip(*(g.graph.find_nodes(op="placeholder") for g in (traced, graph_module)), strict=False))
    # Where Dynamo made weights no inputs, they are named otherwise.
    own = any(True for g in (traced, graph_module) for _ in g.named_parameters())
    if sources is None or own or not all(hasattr(node, "_dynamo_source") for _, node in pairs):
        return
    traced.meta |= graph_module.meta
    traced._param_name_to_source = sources
    for node, origin in pairs:
        node._dynamo_source = origin._dynamo_source
        if "tensor_dict" in origin.meta:
            node.meta["tensor_dict"] = origin.meta["tensor_dict"]


def regions(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph, and those that it runs under activation checkpointing."""
    return [graph_module, *(m for m in graph_module.children() if isinstance(m, fx.GraphModule))]


@contextmanager
def _regions_say_what_they_recompute(graph_module: fx.GraphModule) -> Iterator[None]:
    """make_fx takes no region that leaves it unsaid that all is recomputed."""
    unsaid = [region for region in regions(graph_module)[1:] if _RECOMPUTED not in region.meta]
    for region in unsaid:
        region.meta[_RECOMPUTED] = _ALL
    try:
        with quiet("torch._higher_order_ops.wrap"):
            yield
    finally:
        for region in unsaid:
            del region.meta[_RECOMPUTED]


def _recompute(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


_ALL = functools.partial(create_selective_checkpoint_contexts, _recompute)


def _fake(given: Any, mode: FakeTensorMode, context: TracingContext) -> Any:
    """The fake of an input with the symbolic sizes that Dynamo chose; AOTAutograd will ask `mode` for the same one."""
    if not isinstance(given, Tensor):
        return given
    symbolic = context.tensor_to_context.get(given)
    source = getattr(symbolic, "tensor_source", None)
    return mode.from_tensor(given, symbolic_context=symbolic, source=source, static_shapes=None if symbolic else True)
