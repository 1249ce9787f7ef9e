"""What `Schedule.find` returns: the cases of matching, at the level of a Schedule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import burnish
from burnish.pattern import call_module
from tests.scheduling.models import Attention, LeNet, SelfAttention, Stack, projection
from tests.zoo.plain import SlapoAttention


def names(found):
    return [[(parent, node.name) for parent, node in occurrence] for occurrence in found]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + x


def test_a1_relu_of_a_convolution_plus_x():
    sch = burnish.create_schedule(Residual())
    assert names(sch.find(lambda x, y: F.relu(x) + y)) == [[("", "relu"), ("", "add")]]


@pytest.mark.parametrize("pattern", [lambda x: F.relu(x), nn.ReLU(), lambda x: call_module("relu", x)])
def test_a1_every_spelling_of_a_relu_module(pattern):
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 3, 3))
    model.add_module("relu", nn.ReLU())
    assert names(burnish.create_schedule(model).find(pattern)) == [[("", "relu")]]


def test_a2_two_linears_with_relu_in_lenet():
    found = burnish.create_schedule(LeNet()).find(nn.Sequential(nn.Linear(64, 16), nn.ReLU()))
    assert names(found) == [[("", "fc1"), ("", "relu1")], [("", "fc2"), ("", "relu2")]]


def test_a2_a_tanh_that_is_named_linear_is_none():
    model = nn.Sequential()
    model.add_module("linear", nn.Tanh())
    model.add_module("relu", nn.ReLU())
    sch = burnish.create_schedule(model)
    assert sch.find(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
    assert len(sch.find(lambda x: F.relu(call_module("linear", x)))) == 1


def test_a3_three_projections_in_order_with_their_parents():
    found = burnish.create_schedule(Attention()).find(projection)
    assert [[parent for parent, _ in occurrence] for occurrence in found] == [["self_attn"] * 6] * 3
    assert [occurrence[0][1].target for occurrence in found] == [f"self_attn.{x}_proj" for x in "qkv"]


def test_a3_a_name_is_matched_as_a_whole():
    model = nn.Sequential()
    for name in ("fc1", "fc10", "xfc1"):
        model.add_module(name, nn.Linear(4, 4))
    sch = burnish.create_schedule(model)
    assert sch.find("fc1") == [("", "fc1")]
    assert sch.find("fc") == []
    assert len(sch.find(lambda x: call_module("fc1", x))) == 1
    assert burnish.create_schedule(nn.Sequential(model)).find(r"0\.fc10") == [("0", "fc10")]


def test_a4_the_same_below_as_at_the_root():
    deep = burnish.create_schedule(nn.Sequential(nn.Identity(), Stack(2)))
    root = burnish.create_schedule(SelfAttention())
    part = deep["1.layers.0.self_attn"]
    assert names(part.find(projection)) == names(root.find(projection))
    parents = [parent for occurrence in deep.find(projection) for parent, _ in occurrence]
    assert parents == ["1.layers.0.self_attn"] * 18 + ["1.layers.1.self_attn"] * 18


def test_a5_commuted_sums_and_products():
    class Products(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return (x + y) * (y - z)

    sch = burnish.create_schedule(Products())
    assert len(sch.find(lambda x, y, z: (x + y) * (y - z))[0]) == 3
    assert len(sch.find(lambda x, y, z: (y - z) * (y + x))) == 1
    assert sch.find(lambda x, y, z: (x + y) * (z - y) * 1) == []
    assert sch.find(lambda x, y, z: (y - z) * (z + x)) == []


def test_a6_a_diamond_and_what_is_not_connected():
    class Diamond(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left = torch.sin(x)
            other = torch.exp(x)
            right = torch.cos(x)
            return (left * right) - other

    class Unconnected(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) * (x + 1)

    sch = burnish.create_schedule(Diamond())
    assert names(sch.find(lambda x: torch.sin(x) * torch.cos(x))) == [[("", "sin"), ("", "cos"), ("", "mul")]]
    assert burnish.create_schedule(Unconnected()).find(lambda x: F.relu(x) + 1) == []


def test_a_call_of_a_module_of_ones_own():
    model = nn.Sequential(Stack(2))
    found = burnish.create_schedule(model).find(lambda x: call_module("proj", call_module("self_attn", x), x))
    assert names(found) == [[(f"0.layers.{i}", "self_attn"), (f"0.layers.{i}", "proj")] for i in range(2)]


def test_example_inputs_tell_how_long_a_shape_is():
    model = SlapoAttention(32, 4)
    sch = burnish.create_schedule(model, (torch.randn(2, 5, 32),))
    found = sch.find(lambda x: x.permute(0, 2, 1, 3).contiguous())
    assert [[parent for parent, _ in occurrence] for occurrence in found] == [["self_attn", "self_attn"]]
    assert burnish.create_schedule(model).find(lambda x: x.permute(0, 2, 1, 3).contiguous()) == []


def test_node_predicates():
    sch = burnish.create_schedule(Attention())
    permutes = sch.find(lambda node: node.op == "call_method" and node.target == "permute")
    assert [parent for parent, _ in permutes] == ["self_attn"] * 4

    def linears(n: fx.Node) -> bool:
        return n.op == "call_module" and n.target == "dense"

    assert [(parent, node.name) for parent, node in sch.find(linears)] == [("proj", "dense")]
    assert [(parent, node.name) for parent, node in sch["proj"].find(linears)] == [("", "dense")]


def test_modules_that_keep_what_they_see_keep_nothing_of_the_search():
    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x * 2

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keeping = Keeping()

        def forward(self, x: Tensor) -> Tensor:
            return self.keeping(x) + 1

    sch = burnish.create_schedule(Calling(), (torch.ones(2),))
    assert len(sch.find(lambda node: node.target == "keeping")) == 1
    assert type(sch.mod.keeping.last) is Tensor


def test_names_are_printed_as_they_are():
    sch = burnish.create_schedule(Attention())
    assert str(sch.find(r"[qkv]_proj")) == "[('self_attn', q_proj), ('self_attn', k_proj), ('self_attn', v_proj)]"
    assert sch["self_attn"].find("q_proj") == [("", "q_proj")]


def test_the_model_is_not_changed():
    model = Attention()
    sch = burnish.create_schedule(model)
    before = {name: sorted(vars(module)) for name, module in sch.mod.named_modules()}
    sch.find(projection)
    sch.find(lambda node: True)
    assert {name: sorted(vars(module)) for name, module in sch.mod.named_modules()} == before


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (3, TypeError, "find: give a regular expression, a pattern .*, got int"),
        ("(", ValueError, r"find: '\(' is not a regular expression"),
        (torch.relu, ValueError, "such as lambda x: relu"),
        (F.relu, ValueError, "such as lambda x: relu"),
        (lambda x: x, ValueError, "pattern <lambda>: returns x, which it does not compute"),
    ],
)
def test_what_is_no_query(query, error, message):
    with pytest.raises(error, match=message):
        burnish.create_schedule(Attention()).find(query)


def test_a_class_is_no_query():
    with pytest.raises(TypeError, match="Linear is a class; give a module of it"):
        burnish.create_schedule(nn.Sequential(nn.Linear(4, 4))).find(nn.Linear)
