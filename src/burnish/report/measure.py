"""A graph run on the inputs of a call: how long each node takes and what runs for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish._text import human_us
from burnish.report.kernels import kernels, operators
from burnish.report.replays import replayed
from burnish.report.rows import Seen
from burnish.report.sizes import noting
from burnish.report.timing import Times, take_times
from burnish.report.walk import Walk
from burnish.runtime.module import State

_NOISE = 1.02  # so much longer than a call its ops may take, one by one, before it is told
_WHOLE = 1 - 1e-9  # that rounding leaves no less than nothing of a call


class Measured(NamedTuple):
    """seen: the graph as it ran. times: of the calls. notes: what a reader has to know of how the two fit together."""

    seen: Seen
    times: Times
    notes: tuple[str, ...]


def measure(
    graph_module: fx.GraphModule,
    functions: Mapping[fx.Node, Callable[..., Any]],
    leaves: Sequence[Any],
    call: Callable[[], Any],
    *,
    where: torch.device,
    seconds: float,
    cuda_graph: bool = False,
) -> Measured:
    """The graph as it ran with `functions` in place of some nodes' targets, and the times of `call()`, which computes
    the same. Wants to be called without gradients.

    The nodes' times add up to a call's, or to less: where they were longer, one by one, they are scaled.

    Args:
        cuda_graph: `call()` replays one; the nodes' kernels are timed there.
    """
    walk, cuda = Walk(graph_module, functions), where.type == "cuda"
    seen, notes = Seen(graph_module, {}), list[str]()
    with torch.cuda.device(where) if cuda else contextlib.nullcontext():
        call()
        walk(leaves, noting(seen.work))
        times = take_times(walk, leaves, call, cuda=cuda, seconds=seconds)
        if cuda:
            seen.launches, seen.us = kernels(walk, leaves)
        else:
            seen.launches, seen.us = operators(walk, leaves), times.node_us
        if cuda_graph:
            replay = replayed(call, seen.launches, seen.us)
            seen.launches, seen.us = replay.launches, replay.us
            if not replay.told_apart:
                notes.append(
                    "The kernels of the CUDA graph could not be told apart: what an op takes of it is in proportion to "
                    "what it takes when each is launched by itself."
                )
    seen.us = {node: seen.us.get(node, 0.0) for node in seen.work}
    ops_us = sum(seen.us.values())
    if ops_us > times.end_to_end_us:
        seen.us = {node: us * _WHOLE * times.end_to_end_us / ops_us for node, us in seen.us.items()}
        if ops_us > _NOISE * times.end_to_end_us:
            both = f"{human_us(ops_us)} when measured one by one, and the whole call {human_us(times.end_to_end_us)}"
            notes.append(f"The ops took {both}: their times are scaled to the call.")
    return Measured(seen, times, tuple(notes))


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
