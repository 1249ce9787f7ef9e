"""The memory that graphs share: what happens when a capture breaks, and when the last graph is gone."""

from __future__ import annotations

import pytest
import torch

from burnish.runtime.cuda_graph import GraphMemory

pytestmark = pytest.mark.gpu


def doubled(memory: GraphMemory, x: torch.Tensor) -> float:
    graph, result = memory.capture(lambda: 2 * x)
    graph.replay()
    return float(result)


def test_memory_outlives_its_graphs() -> None:
    memory, x = GraphMemory(), torch.tensor(21.0, device="cuda")
    assert [doubled(memory, x) for _ in range(3)] == [42.0] * 3


def test_a_broken_capture_harms_no_other() -> None:
    memory, x = GraphMemory(), torch.tensor(21.0, device="cuda")
    kept, result = memory.capture(lambda: x + 1)
    with pytest.raises(RuntimeError):
        memory.capture(lambda: x.item())
    with pytest.raises(KeyError):
        memory.capture(lambda: {}[x + 1])
    assert doubled(memory, x) == 42.0
    kept.replay()
    assert float(result) == 22.0
