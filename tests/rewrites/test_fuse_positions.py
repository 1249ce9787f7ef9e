"""The rotary tables' position of one new token is the length that is on the device already; what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish import ops
from burnish.lower import op_of
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import verify
from tests.rewrites.test_fuse_append import captured_step

aten = torch.ops.aten
Positions = Callable[[Tensor], Tensor]


class Turns(nn.Module):
    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1, 0.01]))

    def forward(self, lengths: Tensor) -> tuple[Tensor, ...]:
        positions = self.positions(lengths)
        return *ops.rope_tables(positions, self.inv_freq), positions


@pytest.mark.parametrize(
    "positions",
    [
        lambda n: torch.arange(1) + n,
        lambda n: (n + torch.arange(0, 1)).unsqueeze(0),
        lambda n: (torch.arange(0, 1, 1) + n)[None],
        lambda n: (torch.arange(1, dtype=torch.int32) + n.int())[None],
    ],
)
def test_one_position_is_the_length(rewrite: Callable[..., Any], positions: Positions) -> None:
    found = rewrite(Turns(positions), torch.tensor(7))
    assert found.fused.matches == {"position from length": 1}
    (tables,) = (node for node in found.graph.nodes if node.target is ops.rope_tables.overload)
    assert tables.args[0].target is aten.view.default
    *_, returned = found.graph.output_node().args[0]
    assert returned is not tables.args[0]  # what is returned shares no memory with what is given


@pytest.mark.parametrize(
    "positions",
    [
        lambda n: torch.arange(2) + n,
        lambda n: torch.arange(1, 2) + n,
        lambda n: torch.arange(1, dtype=torch.int64) + n.int(),
        lambda n: torch.arange(1.0) + n,
        lambda n: torch.arange(1) - n,
        lambda n: torch.add(torch.arange(1), n, alpha=2),
        lambda n: torch.arange(1) + n[None],
        lambda n: torch.arange(1)[None] + n,
        lambda n: torch.arange(1) + 7 + n.new_zeros(3),
    ],
)
def test_what_is_left_alone(rewrite: Callable[..., Any], positions: Positions) -> None:
    assert not rewrite(Turns(positions), torch.tensor(7)).fused.matches


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_captured_step(tokens: int) -> None:
    program, _, leaves = captured_step(tokens)
    apply("raise", RAISE, program.graph_module)
    record = apply("fuse", FUSE, program.graph_module)
    assert record.matches.get("position from length", 0) == (tokens == 1)
    ranges = [node for node in program.graph_module.graph.nodes if "arange" in str(node.target)]
    assert len(ranges) == (tokens != 1)
    checked = verify(program.graph_module, program.captured, leaves, lambda node: op_of(node.target).reference)  # type: ignore[union-attr]
    assert not checked.failures
