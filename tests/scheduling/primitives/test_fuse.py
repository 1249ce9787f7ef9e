"""`fuse`: matches as submodules of their own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.pattern import call_module
from burnish.scheduling.primitives.fuse import COMPILERS, Fused
from tests.scheduling.models import Attention, LeNet, Projection, bias_dropout_residual_norm
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs, fingerprint


def linear_relu(x):
    return F.relu(call_module(r"fc\d", x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Projection().eval()


def fused(model, compiler, name=None):
    sch = burnish.create_schedule(model)
    sch["dense"].decompose()
    sch.fuse(bias_dropout_residual_norm, compiler, name=name)
    return sch


def test_the_nodes_are_one_submodule_with_their_modules_and_weights(model):
    sch = fused(model, "none", "Tail")
    assert isinstance(sch.mod.Tail, Fused)
    assert [name for name, _ in sch.mod.named_parameters()] == [
        "dense.weight",
        "Tail.body.dense.bias",
        "Tail.body.layer_norm.weight",
        "Tail.body.layer_norm.bias",
    ]
    assert str(sch.mod)
    assert [n.name for n in sch.mod.Tail.body.graph.nodes if n.op == "placeholder"] == ["x", "residual"]
    built = sch.build()
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    assert_same_outputs(built, model, x, residual)
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=x, residual=residual)


def test_dropout_follows_train_and_eval(model):
    built = fused(model, "none").build()
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for module in (built, model):
        module.train()
    torch.manual_seed(1)
    expected = model(x, residual)
    torch.manual_seed(1)
    assert torch.equal(built(x, residual), expected)
    assert not torch.equal(built(x, residual), expected)
    for module in (built, model):
        module.eval()
    assert torch.equal(built(x, residual), model(x, residual))


def test_burnish_optimizes_it_at_the_first_call(model, untimed):
    built = fused(model, "burnish").build()
    part = built.Fused_0
    assert part.__dict__["_compiled"] is None
    for shape in ((2, 5, 32), (1, 1, 32)):
        assert_same_outputs(built, model, torch.randn(shape), torch.randn(shape))
    optimized = part.__dict__["_compiled"]
    assert optimized.schedule.served[0].kept_original is None
    assert {"add_layer_norm"} <= {name for step in optimized.schedule.history for name in step.matches}
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=torch.randn(2, 5, 32), residual=torch.randn(2, 5, 32))
    assert copy.deepcopy(built).Fused_0.__dict__["_compiled"] is None


def test_burnish_in_train_mode_with_gradients(model, untimed):
    built = fused(model, "burnish").build().train()
    model.dropout.p = 0.0
    built.Fused_0.body.dropout.p = 0.0
    model.train()
    x, residual = (torch.randn(2, 5, 32) for _ in range(2))
    assert_same_gradients(built, model, x=x, residual=residual)


def test_burnish_keeps_the_dropout(model, untimed):
    built = fused(model, "burnish").build().train()
    x, residual = torch.randn(64, 32), torch.zeros(64, 32)
    first, second = built(x, residual), built(x, residual)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert built.dense.weight.grad is not None


def test_nothing_is_compiled_for_a_look_at_how_modules_are_called(model):
    sch = burnish.create_schedule(model, (torch.randn(2, 32), torch.randn(2, 32)))
    sch.fuse(lambda x, y: call_module("dropout", x) + y)
    assert len(sch.find(lambda node: node.op == "call_module" and node.target == "dropout")) == 1
    assert sch.mod.Fused_0.__dict__["_compiled"] is None


def test_inductor_is_asked_to_compile(model, monkeypatch):
    asked: list[nn.Module] = []
    monkeypatch.setitem(COMPILERS, "inductor", lambda body: asked.append(body) or body)
    built = fused(model, "inductor").build()
    assert_same_outputs(built, model, torch.randn(2, 32), torch.randn(2, 32))
    assert asked == [built.Fused_0.body] or len(asked) == 2


@pytest.mark.slow
def test_inductor(model):
    built = fused(model, "inductor").build()
    assert_same_outputs(built, model, torch.randn(2, 32), torch.randn(2, 32))


def test_each_match_is_a_submodule():
    model = LeNet().eval()
    sch = burnish.create_schedule(model)
    assert sch.fuse(sch.find(linear_relu), "none", name="linear_relu").matches == 2
    assert [name for name, _ in sch.mod.named_children()] == ["conv", "fc3", "linear_relu", "linear_relu_1"]
    assert_same_outputs(sch.build(), model, torch.randn(2, 1, 8, 8))
    assert_same_names(sch.build(), model)


def test_back_to_back_matches():
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(torch.sin(torch.cos(x))))

    sch = burnish.create_schedule(Chain())
    assert sch.fuse(lambda x: torch.sin(torch.cos(x)), "none").matches == 2
    assert "fused_1 = self.Fused_1(fused_0)" in sch.mod.code
    assert_same_outputs(sch.build(), Chain(), torch.randn(3))


def test_a_module_that_is_called_elsewhere_too_keeps_its_place():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc1(F.relu(self.fc1(x)))

    model = Twice()
    sch = burnish.create_schedule(model)
    sch.fuse(linear_relu, "none")
    assert sch.mod.fc1 is sch.mod.Fused_0.body.fc1
    assert_same_outputs(sch.build(), model, torch.randn(2, 4))
    assert_same_names(sch.build(), model)


def test_what_is_fused_is_still_found(model):
    sch = fused(model, "none")
    found = sch.find(lambda x, y: call_module("dropout", x) + y)
    assert [parent for parent, _ in found[0]] == ["Fused_0.body", "Fused_0.body"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "dense", "compiler": "gcc"}, "compiler='gcc': use 'burnish', 'inductor', 'none'"),
        ({"match": []}, "match is empty"),
        ({"match": bias_dropout_residual_norm}, "nothing in Projection matches"),
        ({"match": "dense", "name": "two words"}, "name must be a Python name"),
    ],
)
def test_refusals(model, arguments, message):
    sch = burnish.create_schedule(model)
    before = fingerprint(sch.mod)
    with pytest.raises(ValueError, match=message):
        sch.fuse(**arguments)
    assert fingerprint(sch.mod) == before
    assert sch.history == []


def test_in_a_model_that_crosses_modules():
    model = Attention().eval()
    sch = burnish.create_schedule(model)
    sch.fuse(lambda x, residual: call_module("proj.dropout", call_module("proj.dense", x)) + residual, "none")
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)


def test_matches_across_and_inside_a_module():
    def across(x):
        return call_module("proj.dense", x.flatten(2))

    def inside(x):
        return call_module("self_attn.dropout", F.softmax(x, dim=-1))

    model = Attention().eval()
    sch = burnish.create_schedule(model)
    assert sch.fuse([*sch.find(inside), *sch.find(across)], "none").matches == 2
    assert [name for name in sch if name.startswith("Fused")] == ["Fused_0", "Fused_1"]
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)
