"""`decompose`: a Linear as a product and a sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.scheduling.primitives.decompose import SeparateBiasLinear
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs


def test_product_and_sum_with_the_same_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    sch = burnish.create_schedule(model)
    sch["0"].decompose()
    assert isinstance(sch.mod[0], SeparateBiasLinear)
    assert sch.mod[0].weight is model[0].weight
    assert "bias=True" in str(sch.mod)
    assert len(sch.find(lambda x, y: torch.relu(x + y))) == 1
    built = sch.build()
    assert_same_outputs(built, model, torch.randn(2, 4))
    assert_same_names(built, model)
    assert_same_gradients(built, model, input=torch.randn(2, 4))


def test_without_bias_it_stays():
    sch = burnish.create_schedule(nn.Sequential(nn.Linear(4, 3, bias=False)))
    sch["0"].decompose()
    assert type(sch.mod[0]) is nn.Linear
    assert len(sch.history) == 1


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Bilinear(2, 2, 2)])
def test_what_is_no_linear(module):
    sch = burnish.create_schedule(nn.Sequential(module))
    with pytest.raises(ValueError, match=f"decompose: 0 is a {type(module).__name__}, not a Linear"):
        sch["0"].decompose()


def test_hooks_would_be_lost():
    linear = nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks or is checkpointed"):
        burnish.create_schedule(linear).decompose()
