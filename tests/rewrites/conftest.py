"""Functions as models: what the rewrites find in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.capture import Program, capture
from burnish.lower import op_of
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import Verification, verify


class Function(nn.Module):
    """A function as a module; its arguments are the module's inputs."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


@dataclass(frozen=True)
class Rewritten:
    """What became of a model: the Program, the records of both steps, and what verification says."""

    program: Program
    raised: StepRecord
    fused: StepRecord
    verification: Verification

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph_module.graph

    @property
    def ops(self) -> Counter[str]:
        return Counter(op.name for node in self.graph.nodes if (op := op_of(node.target)) is not None)

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        """All arguments of every Op call, in order; nodes as they are."""
        found = ((op_of(node.target), node) for node in self.graph.nodes)
        return [op.bind(*node.args, **node.kwargs) for op, node in found if op is not None]

    @property
    def targets(self) -> Counter[Any]:
        return Counter(node.target for node in self.graph.nodes if node.op == "call_function")

    @property
    def reasons(self) -> str:
        return "\n".join(map(str, (*self.raised.near_misses, *self.fused.near_misses)))


@pytest.fixture
def rewrite() -> Callable[..., Rewritten]:
    """`rewrite(function or module, *inputs)`: captured, raised, fused, and right as far as verification can see."""

    def run(model: Callable[..., Any], *inputs: Any) -> Rewritten:
        module = model if isinstance(model, nn.Module) else Function(model)
        program = capture(module.eval() if isinstance(model, nn.Module) else module, inputs)
        raised = apply("raise", RAISE, program.graph_module)
        fused = apply("fuse", FUSE, program.graph_module)
        leaves = pytree.tree_leaves((inputs, {}))
        checked = verify(
            program.graph_module,
            program.captured,
            leaves,
            lambda node: op_of(node.target).reference,  # type: ignore[union-attr]
        )
        assert not checked.failures, [unit.verdict for unit in checked.failures]
        program.graph_module.graph.lint()
        return Rewritten(program, raised, fused, checked)

    return run


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
