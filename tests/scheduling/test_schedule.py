"""The handle: parts of a model, steps, undo, build."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.scheduling import FusedLinears
from tests.scheduling.models import (
    Attention,
    Stack,
    bias_dropout_residual_norm,
    core_attention,
    heads,
    projection,
    sdpa,
)
from tests.scheduling.same import (
    assert_same_gradients,
    assert_same_names,
    assert_same_outputs,
    fingerprint,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().eval()


def test_parts_and_names(model):
    sch = burnish.create_schedule(model)
    assert list(sch) == ["self_attn", "proj"]
    assert "proj" in sch
    assert "self_attn.q_proj" in sch
    assert "q_proj" not in sch
    part = sch["self_attn"]["q_proj"]
    assert part.path == "self_attn.q_proj"
    assert isinstance(part.mod, nn.Linear)
    assert part.mod.weight is model.self_attn.q_proj.weight
    assert str(sch.mod) == str(model)
    assert repr(part) == "Schedule of Linear at 'self_attn.q_proj', 0 steps"
    with pytest.raises(KeyError, match=r"self_attn has no 'q_prok'; it has q_proj"):
        sch["self_attn.q_prok"]


def test_nothing_is_done_where_no_step_was_taken(model):
    built = burnish.create_schedule(model).build()
    assert type(built) is Attention
    assert fingerprint(built)[0][2] is fingerprint(model)[0][2]
    x = torch.randn(2, 5, 32)
    assert torch.equal(built(x), model(x))


def test_the_tutorial(model):
    before = fingerprint(model)
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears.with_tail(heads), sch.find(projection))
    sch.replace(sdpa, sch.find(core_attention))
    sch["proj.dense"].decompose()
    sch.fuse(sch.find(bias_dropout_residual_norm), compiler="none", name="BiasDropoutResidualNorm")
    built = sch.build()
    assert [name for name, _ in built.self_attn.named_children()] == ["FusedLinears_0"]
    assert isinstance(built.proj.BiasDropoutResidualNorm.body.layer_norm, nn.LayerNorm)
    assert fingerprint(model) == before
    for shape in ((2, 5, 32), (1, 1, 32), (3, 33, 32)):
        assert_same_outputs(built, model, torch.randn(shape))
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=torch.randn(2, 5, 32))
    assert [step.primitive for step in sch.history] == ["replace", "replace", "decompose", "fuse"]
    assert [step.matches for step in sch.history] == [3, 1, 1, 1]


def test_every_step_is_undone_one_by_one(model):
    sch = burnish.create_schedule(model)
    states = [fingerprint(sch.mod)]
    for step in (
        lambda: sch.replace(FusedLinears.with_tail(heads), projection),
        lambda: sch["proj"].trace(),
        lambda: sch["proj.dense"].decompose(),
        lambda: sch["proj"].checkpoint(),
        lambda: sch["proj"].annotate("stage", 1),
        lambda: sch.replace_all(nn.LayerNorm, lambda old: nn.Identity()),
        lambda: sch.trace(flatten=True),
    ):
        step()
        states.append(fingerprint(sch.mod))
    for state in reversed(states[:-1]):
        assert len(sch.undo()) == 1
        assert fingerprint(sch.mod) == state
    assert sch.history == []
    with pytest.raises(ValueError, match="undo: n must be between 0 and 0"):
        sch.undo()


def test_undo_of_several_steps_and_on_from_there(model):
    sch = burnish.create_schedule(model)
    before = fingerprint(sch.mod)
    sch["proj.dense"].decompose()
    sch["self_attn"].checkpoint()
    undone = sch["proj"].undo(2)
    assert [step.primitive for step in undone] == ["decompose", "checkpoint"]
    assert fingerprint(sch.mod) == before
    sch["proj.dense"].decompose()
    assert len(sch.history) == 1


def test_a_built_module_is_independent_of_later_steps(model):
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears.with_tail(heads), projection)
    built = sch.build()
    shown = str(built)
    sch.replace_all(nn.LayerNorm, lambda old: nn.Identity())
    sch["proj"].checkpoint()
    assert str(built) == shown
    sch.undo(3)
    assert str(built) == shown
    assert_same_outputs(built, model, torch.randn(2, 5, 32))


def test_a_part_can_be_built(model):
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears.with_tail(heads), projection)
    built = sch["self_attn"].build()
    assert_same_outputs(built, model.self_attn, torch.randn(2, 5, 32))
    assert_same_names(built, model.self_attn)


def test_a_group_is_one_step():
    model = Stack(3).eval()
    sch = burnish.create_schedule(model)
    group = sch.find_all("layers.*.self_attn")
    assert [member.path for member in group] == [f"layers.{i}.self_attn" for i in range(3)]
    assert len(sch["layers"].find_all("*.self_attn")) == 3
    step = group.replace(FusedLinears.with_tail(heads), projection)
    assert step.matches == 9
    assert len(sch.history) == 1
    built = sch.build()
    assert sum(isinstance(module, FusedLinears) for module in built.modules()) == 3
    assert_same_outputs(built, model, torch.randn(2, 5, 32))
    assert_same_names(built, model)
    sch.undo()
    assert str(sch.mod) == str(model)


def test_a_group_changes_all_or_none():
    model = Stack(3)
    model.layers[2].proj.dense = nn.Identity()
    sch = burnish.create_schedule(model)
    before = fingerprint(sch.mod)
    with pytest.raises(ValueError, match=r"layers\.2\.proj\.dense is a Identity, not a Linear"):
        sch.find_all("layers.*.proj.dense").decompose()
    assert fingerprint(sch.mod) == before
    assert sch.history == []
    with pytest.raises(ValueError, match=r"has no submodules 'layer\.\*'; its own are layers"):
        sch.find_all("layer.*")


def test_a_failing_apply_leaves_all_as_it_was(model, monkeypatch):
    from burnish.scheduling.primitives import Decompose

    apply = Decompose.apply

    def failing(self, schedule, plan):
        apply(self, schedule, plan)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Decompose, "apply", failing)
    sch = burnish.create_schedule(model)
    before = fingerprint(sch.mod)
    with pytest.raises(RuntimeError, match="in the middle"):
        sch["proj.dense"].decompose()
    assert fingerprint(sch.mod) == before
    assert sch.history == []


def test_training_goes_on_in_the_models_own_weights(model):
    sch = burnish.create_schedule(model)
    sch["proj.dense"].decompose()
    built = sch.build()
    with torch.no_grad():
        built.proj.dense.weight.zero_()
    assert not model.proj.dense.weight.any()


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda x: x, None, "model must be a torch.nn.Module, got function"),
        (nn.Linear(2, 2), torch.randn(2), "example_inputs must be a tuple .* got Tensor"),
    ],
)
def test_bad_arguments(model, inputs, message):
    with pytest.raises(TypeError, match=message):
        burnish.create_schedule(model, inputs)


def test_a_part_that_is_gone(model):
    sch = burnish.create_schedule(model)
    part = sch["self_attn.q_proj"]
    sch.replace(FusedLinears.with_tail(heads), projection)
    with pytest.raises(KeyError, match="self_attn has no 'q_proj'"):
        part.decompose()


def test_undo_leaves_the_mode_as_it_is():
    sch = burnish.create_schedule(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval())
    sch["0"].decompose()
    sch.mod.train()
    sch.undo()
    assert sch.mod.training
    assert all(module.training for module in sch.mod)
