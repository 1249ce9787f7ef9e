"""A graph run on the inputs of a call: how long each node takes and what runs for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.report.kernels import kernels, operators
from burnish.report.rows import Seen
from burnish.report.sizes import noting
from burnish.report.timing import Times, take_times
from burnish.report.walk import Walk
from burnish.runtime.module import State


def measure(
    graph_module: fx.GraphModule,
    functions: Mapping[fx.Node, Callable[..., Any]],
    leaves: Sequence[Any],
    call: Callable[[], Any],
    *,
    where: torch.device,
    seconds: float,
) -> tuple[Seen, Times]:
    """The graph as it ran with `functions` in place of some nodes' targets, and the times of `call()`, which computes
    the same. Wants to be called without gradients."""
    walk, cuda = Walk(graph_module, functions), where.type == "cuda"
    seen = Seen(graph_module, {})
    with torch.cuda.device(where) if cuda else contextlib.nullcontext():
        call()
        walk(leaves, noting(seen.work))
        times = take_times(walk, leaves, call, cuda=cuda, seconds=seconds)
        if cuda:
            seen.launches, node_us = kernels(walk, leaves)
        else:
            seen.launches, node_us = operators(walk, leaves), times.node_us
    seen.us = {node: node_us.get(node, 0.0) for node in seen.work}
    return seen, times


def device_of(model: nn.Module, leaves: Sequence[Any]) -> torch.device:
    """Where the model computes: a GPU where anything of it or its inputs is there.

    ValueError for weights without values.
    """
    tensors = [*model.parameters(), *model.buffers(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if any(device.type == "meta" for device in devices):
        raise ValueError("model: it is on the meta device and cannot be run; give target='h200', say, to predict")
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The flat inputs, in the order in which `burnish.capture` takes them."""
    return pytree.tree_leaves((args, dict(kwargs)))


def refuse_caches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """ValueError for an input that each call changes: it would be another call every time."""
    named = [*((f"args[{i}]", value) for i, value in enumerate(args)), *kwargs.items()]
    for name, value in named:
        if isinstance(value, State) or hasattr(value, "get_seq_length"):
            raise ValueError(f"{name}: a cache grows with each call, and calls are measured many times; leave it out")
