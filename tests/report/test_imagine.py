"""A GPU that is not here: rewritten as it would be there, without weights and without running anything."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.report.data import CUDA_GRAPH, Explanation
from burnish.targets import find_target
from tests import zoo
from tests.zoo.plain import DecoderBlock


@pytest.fixture(scope="module")
def there() -> Explanation:
    case = zoo.CASES["llama-sdpa"]
    model = case.build().to("meta", torch.bfloat16)
    inputs = {name: value.to("meta") for name, value in case.inputs(2, 16, torch.bfloat16).items()}
    found = burnish.explain(model, (), inputs, target="h100").explanation
    assert found is not None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return found


def test_all_is_predicted(there: Explanation) -> None:
    assert there.after is not None
    for profile in (there.before, there.after):
        assert profile.predicted
        assert profile.device == "NVIDIA H100 SXM (not here)"
        assert profile.bandwidth_gbs == pytest.approx(1e6 / find_target("h100").floor_us(0, 1e9))
        rows = [row for block in profile.blocks for row in block.rows]
        assert all(row.us is None for row in rows)
        assert all(row.predicted_us >= row.floor_us for row in rows)
        assert profile.end_to_end_us == pytest.approx(sum(b.us * b.count for b in profile.blocks) + 5.0)
    assert there.after.end_to_end_us < there.before.end_to_end_us
    assert there.after.launches < there.before.launches / 3
    assert any("Predicted" in note for note in there.notes)
    assert CUDA_GRAPH not in {each.rewrite for each in there.opportunities}, "there is one already"


def test_kernels_that_only_some_of_the_folded_layers_have_are_counted() -> None:
    """A layer's last product ends in the next one's norm: 8 kernels in the first layer, 7 in each of the others."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(DecoderBlock(64, 4, pre_norm=True) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, mask)
            return x

    with torch.device("meta"):
        model, inputs = Layers().half().eval(), (torch.empty(2, 32, 64).half(), torch.empty(32, 32).bool())
    after = burnish.explain(model, inputs, target="h200").explanation.after  # type: ignore[union-attr]
    assert after is not None
    assert max(block.count for block in after.blocks) > 1
    assert after.launches == 22


def test_it_is_rewritten_as_on_that_gpu(there: Explanation) -> None:
    """Products that rotate or end in a norm are for CUDA only."""
    assert there.after is not None
    layers = next(block for block in there.after.blocks if block.count == 2)
    ops = Counter(row.op for row in layers.rows)
    assert ops["burnish.linear_rope"] == ops["burnish.linear_add_rms_norm"] == ops["burnish.gated_mlp"] == 1
    assert not any(op == "aten.cat" for op in ops), "weights are packed once"
    assert {each.rewrite for each in there.opportunities} >= {"linear_rope", "linear_add_norm", "gated_mlp"}
