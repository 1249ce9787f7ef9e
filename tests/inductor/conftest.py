"""What all tests of graphs for Inductor look at."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from burnish.inductor import backend
from burnish.inductor.choices import choose_impls
from burnish.tuning import Tuner


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs that Inductor is given, forward and backward by turns."""
    torch._dynamo.reset()
    found: list[fx.Graph] = []

    def note(graph_module: fx.GraphModule, tuner: Tuner) -> None:
        choose_impls(graph_module, tuner)
        graph_module.graph.lint()
        found.append(fx.Graph())
        found[-1].graph_copy(graph_module.graph, {})  # Inductor changes its own

    monkeypatch.setattr(backend, "choose_impls", note)
    return found
