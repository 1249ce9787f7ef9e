"""Calls as CUDA graphs, so that the device is timed and not how fast the host launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from burnish.bench import Within
from burnish.runtime.cuda_graph import GraphMemory

_CALLS_BEFORE = 3  # in which a variant compiles, tunes, and makes what a capture must not make


def in_graphs(variants: dict[str, Callable[..., object]], args: Sequence[Any]) -> dict[str, Callable[..., object]]:
    """Each variant's call with these arguments as a CUDA graph, which writes to one result; the variant itself where
    its call cannot be captured."""
    memory = GraphMemory()
    return {name: _in_graph(variant, args, memory) for name, variant in variants.items()}


def _in_graph(variant: Callable[..., object], args: Sequence[Any], memory: GraphMemory) -> Callable[..., object]:
    context: AbstractContextManager[object] = variant.context() if isinstance(variant, Within) else nullcontext()
    with context:
        for _ in range(_CALLS_BEFORE):
            variant(*args)
        torch.cuda.synchronize()
        try:
            graph, result = memory.capture(lambda: variant(*args))
        except RuntimeError:
            return variant

    def replay(*_: Any) -> object:
        graph.replay()
        return result

    return replay
