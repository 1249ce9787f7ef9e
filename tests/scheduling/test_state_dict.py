"""The original names of weights that were moved or merged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.scheduling import FusedLinears
from tests.scheduling.models import Attention, Stack, bias_dropout_residual_norm, heads, projection
from tests.scheduling.same import assert_same_names, assert_same_outputs


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture
def built(model):
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears.with_tail(heads), projection)
    sch["proj.dense"].decompose()
    sch.fuse(bias_dropout_residual_norm, "none")
    return sch.build()


def test_names_values_and_order(built, model):
    assert_same_names(built, model)
    assert_same_names(copy.deepcopy(built), model)


def test_entries_are_views_of_the_merged_weight(built):
    state = built.state_dict()
    merged = built.self_attn.FusedLinears_0.weight
    assert state["self_attn.k_proj.weight"].data_ptr() == merged[32:].data_ptr()
    state["self_attn.k_proj.weight"].zero_()
    assert not merged[32:64].any()
    assert merged[:32].all()


def test_a_checkpoint_is_loaded_and_computed_with(built, model):
    other = Attention().eval()
    built.load_state_dict(other.state_dict())
    assert_same_outputs(built, other, torch.randn(2, 5, 32))
    assert not torch.equal(model.self_attn.q_proj.weight, other.self_attn.q_proj.weight)


def test_inside_another_model(built, model):
    outer, expected = nn.Sequential(nn.Linear(2, 2), built), nn.Sequential(nn.Linear(2, 2), model)
    assert list(outer.state_dict()) == list(expected.state_dict())
    assert str(outer.load_state_dict(expected.state_dict())) == "<All keys matched successfully>"


def test_what_is_missing_wrong_or_unknown_is_said_by_its_original_name(built, model):
    state = model.state_dict()
    before = built.state_dict()["self_attn.k_proj.weight"].clone()
    del state["self_attn.k_proj.weight"]
    state["self_attn.nobody"] = torch.zeros(1)
    loaded = built.load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["self_attn.k_proj.weight"]
    assert loaded.unexpected_keys == ["self_attn.nobody"]
    assert torch.equal(built.state_dict()["self_attn.k_proj.weight"], before)
    state = {**model.state_dict(), "self_attn.q_proj.bias": torch.zeros(7)}
    with pytest.raises(RuntimeError, match=r"size mismatch for self_attn.q_proj.bias: it is \(7,\) .* \(32,\)"):
        built.load_state_dict(state)


def test_assign(built):
    other = Attention().eval()
    built.load_state_dict({name: value.double() for name, value in other.state_dict().items()}, assign=True)
    assert built.proj.Fused_0.body.layer_norm.weight.dtype == torch.float64


def test_a_shared_layer_has_its_names_twice():
    layer = Attention()
    model = Stack(0)
    model.layers.extend([layer, layer])
    sch = burnish.create_schedule(model.eval())
    sch.replace(FusedLinears.with_tail(heads), projection)
    assert_same_names(sch.build(), model)


def test_new_weights_have_their_own_names(model):
    sch = burnish.create_schedule(model)
    sch["proj.layer_norm"].replace(nn.Sequential(nn.LayerNorm(32)))
    names = list(sch.build().state_dict())
    assert "proj.layer_norm.0.weight" in names
    assert "proj.layer_norm.weight" not in names
