"""Near misses: those of one rewrite and one reason are one, with all their places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.capture import capture
from burnish.record import NearMiss, together, unnumbered
from burnish.rewrites import FUSE, RAISE, apply


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("linear reads it", "linear_12 reads it", True),
        ("layers.0.mlp is shared", "layers.31.mlp is shared", True),
        ("there are 12 rows", "there are 16 rows", False),
        ("it is of float16", "it is of float64", False),
        ("(x[0], x[1], 64)", "(x[0], x[1], 128)", False),
        ("dropout of 0.1 is active", "dropout of 0.5 is active", False),
    ],
)
def test_numbers_of_nodes_and_modules_make_no_other_reason(one: str, other: str, same: bool) -> None:
    assert (unnumbered(one) == unnumbered(other)) == same


def test_one_reason_is_one_near_miss() -> None:
    misses = [
        NearMiss("norm prologue", "linear reads it too", ("norm",)),
        NearMiss("rope", "linear_1 reads it too", ("rope",)),
        NearMiss("norm prologue", "linear_1 reads it too", ("norm_1",)),
        NearMiss("norm prologue", "linear_1 reads it too", ("norm_1",)),
        NearMiss("gelu", "the graph has no erf"),
    ]
    assert [*map(str, together(misses))] == [
        "norm prologue: norm and 1 more: linear reads it too",
        "rope: rope: linear_1 reads it too",
        "gelu: the graph has no erf",
    ]
    assert together(misses)[0].nodes == ("norm", "norm_1")


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            x = norm(x + shift)
        return x


def test_reasons_call_sizes_as_the_user_knows_them() -> None:
    program = capture(Shifted().eval(), (torch.randn(2, 5, 8), torch.randn(1, 5, 8)))
    apply("raise", RAISE, program.graph_module)
    (miss,) = apply("fuse", FUSE, program.graph_module).near_misses
    assert (miss.rewrite, len(miss.nodes)) == ("add_layer_norm", 3)
    assert miss.reason == "the summands have shapes (x[0], x[1], 8) and (1, x[1], 8)"
