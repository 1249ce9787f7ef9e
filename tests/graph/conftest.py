"""Both dialects of graphs: what functions call (symbolic), and ATen operators (exported)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import fx

from burnish.graph import Pattern, trace


@dataclass(frozen=True)
class Dialect:
    """Traces models and patterns alike in one dialect."""

    name: str

    def trace(self, model: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
        return trace(model, inputs if self.name == "aten" else None)

    def pattern(self, fn: Callable[..., Any], *examples: Any) -> Pattern:
        return Pattern.of(fn, examples if self.name == "aten" else None)


@pytest.fixture(params=["symbolic", "aten"])
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return Dialect(request.param)
