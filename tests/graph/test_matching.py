"""What matches and what does not, in both dialects. The numbers are those of the project's list of cases (A1 ...)."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, randn

from burnish.graph import Pattern, explain_match, find_matches, trace
from burnish.graph.normalize import operation_key
from burnish.pattern import call_module, module

X = randn(2, 4, 8)


def names(matches: Any) -> list[list[str]]:
    return [[node.name for node in match.nodes] for match in matches]


def keys(match: Any, gm: Any) -> list[Any]:
    return [operation_key(node, gm) for node in match.nodes]


class ConvRelu(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return (F.relu(h) if self.functional else self.relu(h)) + x


@pytest.mark.parametrize("functional", [True, False])
def test_a1_relu_and_residual(dialect, functional):
    gm = dialect.trace(ConvRelu(functional), randn(1, 3, 5, 5))
    found = find_matches(gm, dialect.pattern(lambda y, x: F.relu(y) + x, X, X))
    assert [keys(match, gm) for match in found] == [["relu", "add"]]
    # The pattern that adds its own input to its relu is another one: here the convolution lies between.
    assert not find_matches(gm, dialect.pattern(lambda x: F.relu(x) + x, X))


def test_a1_relu_plus_its_own_input(dialect):
    def model(x):
        h = x.sigmoid()
        return F.relu(h) + h

    gm = dialect.trace(model, X)
    found = find_matches(gm, dialect.pattern(lambda x: F.relu(x) + x, X))
    assert [keys(match, gm) for match in found] == [["relu", "add"]]


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("pattern", [lambda x: F.relu(x), lambda x: x.relu(), lambda x: torch.relu(x), nn.ReLU()])
def test_a1_every_spelling_of_relu(functional, pattern):
    gm = trace(ConvRelu(functional))
    assert names(find_matches(gm, pattern)) == [["relu"]]


def test_a1_call_module_by_name():
    gm = trace(ConvRelu(functional=False))
    assert names(find_matches(gm, lambda x, y: call_module("relu", x) + y)) == [["relu", "add"]]
    assert not find_matches(gm, lambda x: call_module("rel", x))
    assert not find_matches(trace(ConvRelu(functional=True)), lambda x: call_module("relu", x))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.conv1(x)), 2)
        x = F.max_pool2d(self.relu(self.conv2(x)), 2)
        x = self.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(self.relu(self.fc2(x)))


class LinearReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


def test_a2_lenet_has_two_linear_relu(dialect):
    gm = dialect.trace(LeNet(), randn(1, 1, 28, 28))
    found = find_matches(gm, dialect.pattern(LinearReLU(), randn(2, 2)))
    assert len(found) == 2
    if dialect.name == "symbolic":
        assert [match.modules["linear"] for match in found] == ["fc1", "fc2"]
    else:
        assert [match.attributes["linear.weight"].target for match in found] == ["fc1.weight", "fc2.weight"]


def test_a2_the_type_decides_not_the_name():
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Tanh()
            self.activation = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.linear(x))

    assert not find_matches(trace(Misnamed()), LinearReLU())
    assert not find_matches(trace(Misnamed()), nn.Linear(2, 2))


def test_a2_a_subclass_is_another_type():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    Scaled.__module__ = "torch.nn.scaled"  # traced as a leaf, like torch's own
    gm = trace(nn.Sequential(Scaled(2, 2), nn.Linear(2, 2)))
    assert names(find_matches(gm, nn.Linear(1, 1))) == [["_1"]]


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.fc1, self.fc10 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (p(x).view(2, 4, 2, 4).permute(0, 2, 1, 3) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v, self.fc1(x), self.fc10(x)


def test_a3_call_module_by_regular_expression():
    gm = trace(QKV())

    def pattern(x: Any) -> Any:
        return call_module(r"[qkv]_proj", x).view(2, 4, 2, 4).permute(0, 2, 1, 3)

    found = find_matches(gm, pattern)
    assert [m.modules[r"[qkv]_proj"] for m in found] == ["q_proj", "k_proj", "v_proj"]
    assert [len(m.nodes) for m in found] == [3, 3, 3]
    assert [m.modules["fc1"] for m in find_matches(gm, lambda x: call_module("fc1", x))] == ["fc1"]
    assert [m.nodes[0].target for m in find_matches(gm, lambda x: call_module("fc1.*", x))] == ["fc1", "fc10"]


def test_a3_three_projections_in_aten():
    def pattern(x, w, b, heads: int):
        return F.linear(x, w, b).view(x.shape[0], x.shape[1], heads, -1).permute(0, 2, 1, 3)

    found = find_matches(trace(QKV(), (X,)), pattern, example_inputs=(randn(3, 5, 6), randn(6, 6), randn(6), 3))
    assert [m.bindings["w"].target for m in found] == ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    assert [m.bindings["heads"] for m in found] == [2, 2, 2]


def test_a4_nested_like_at_the_root(dialect):
    nested = nn.Sequential(nn.Identity(), nn.Sequential(LeNet()))
    pattern = dialect.pattern(LinearReLU(), randn(2, 2))
    flat = find_matches(dialect.trace(LeNet(), randn(1, 1, 28, 28)), pattern)
    deep = find_matches(dialect.trace(nested, randn(1, 1, 28, 28)), pattern)
    assert len(flat) == len(deep) == 2
    assert [len(m.nodes) for m in flat] == [len(m.nodes) for m in deep]


def test_a5_commuted_forms(dialect):
    gm = dialect.trace(lambda x, y, z: (x + y) * (y - z), X, X, X)
    assert len(gm.graph.nodes) == 3 + 3 + 1

    def count(fn: Any) -> list[int]:
        return [len(m.nodes) for m in find_matches(gm, dialect.pattern(fn, X, X, X))]

    assert count(lambda x, y, z: (x + y) * (y - z)) == [3]
    assert count(lambda x, y, z: (y + x) * (y - z)) == [3]
    assert count(lambda x, y, z: (y - z) * (x + y)) == [3]
    assert count(lambda x, y, z: (y - z) * (y + x)) == [3]
    assert count(lambda x, y, z: (x + y) * (z - y)) == []


def test_a5_sub_and_matmul_do_not_commute(dialect):
    gm = dialect.trace(lambda x: torch.matmul(x.relu(), x.neg()) - x, randn(4, 4))
    assert len(find_matches(gm, dialect.pattern(lambda x: torch.matmul(x.relu(), x.neg()) - x, randn(4, 4)))) == 1
    assert not find_matches(gm, dialect.pattern(lambda x: torch.matmul(x.neg(), x.relu()) - x, randn(4, 4)))
    assert not find_matches(gm, dialect.pattern(lambda x: x - torch.matmul(x.relu(), x.neg()), randn(4, 4)))


def test_a5_add_with_alpha_does_not_commute(dialect):
    gm = dialect.trace(lambda x, y: torch.add(x.relu(), y.neg(), alpha=2), X, X)
    assert find_matches(gm, dialect.pattern(lambda x, y: torch.add(x.relu(), y.neg(), alpha=2), X, X))
    assert not find_matches(gm, dialect.pattern(lambda x, y: torch.add(y.neg(), x.relu(), alpha=2), X, X))
    assert not find_matches(gm, dialect.pattern(lambda x, y: x.relu() + y.neg(), X, X))


def test_a6_diamond_between_unrelated_operations(dialect):
    def model(x, y):
        a = x.sigmoid()
        y = y.cos()
        left = a.relu()
        y = y.sin()
        right = a.neg()
        y = y.tanh()
        return left * right, y

    gm = dialect.trace(model, X, X)

    def diamond(x):
        a = x.sigmoid()
        return a.relu() * a.neg()

    assert names(find_matches(gm, dialect.pattern(diamond, X))) == [["sigmoid", "relu", "neg", "mul"]]
    two_sources = dialect.trace(lambda x, y: x.sigmoid().relu() * y.sigmoid().neg(), X, X)
    assert not find_matches(two_sources, dialect.pattern(diamond, X))


def test_a6_edges_count(dialect):
    gm = dialect.trace(lambda x, y: (x.relu(), y + 1.5), X, X)
    assert not find_matches(gm, dialect.pattern(lambda x: x.relu() + 1.5, X))


@pytest.mark.parametrize(
    ("model", "other"),
    [
        (lambda x: F.dropout(x, 0.9), lambda x: F.dropout(x, 0.1)),
        (lambda x: F.softmax(x, dim=-1), lambda x: F.softmax(x, dim=0)),
        (lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: x.sum(-1), lambda x: x.sum(-1, keepdim=True)),
        (lambda x: F.layer_norm(x, (8,), eps=1e-5), lambda x: F.layer_norm(x, (8,), eps=1e-6)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(1, 2)),
        (lambda x: F.leaky_relu(x), lambda x: F.leaky_relu(x, 0.2)),
    ],
)
def test_a7_constants_and_keywords_count(dialect, model, other):
    gm = dialect.trace(model, X)
    assert len(find_matches(gm, dialect.pattern(model, X))) == 1
    assert not find_matches(gm, dialect.pattern(other, X))


def test_a7_scalar_parameter_binds_any_constant(dialect):
    gm = dialect.trace(lambda x: (F.layer_norm(x, (8,), eps=1e-12) * 0.25, F.layer_norm(x, (8,)) * 3.0), X)

    def pattern(x, eps: float, scale: float):
        return F.layer_norm(x, (8,), eps=eps) * scale

    found = find_matches(gm, dialect.pattern(pattern, X, 1.0, 1.0))
    assert [(m.bindings["eps"], m.bindings["scale"]) for m in found] == [(1e-12, 0.25), (1e-5, 3.0)]


def test_a7_one_scalar_twice_must_be_equal(dialect):
    def pattern(x, s: float):
        return (x * s).relu() * s

    assert find_matches(dialect.trace(lambda x: (x * 0.5).relu() * 0.5, X), dialect.pattern(pattern, X, 2.0))
    assert not find_matches(dialect.trace(lambda x: (x * 0.5).relu() * 0.25, X), dialect.pattern(pattern, X, 2.0))


def test_a7_scalar_types(dialect):
    gm = dialect.trace(lambda x: F.softmax(x, dim=1) * 2.5, X)

    def number(x, dim: int, scale: float):
        return F.softmax(x, dim=dim) * scale

    (match,) = find_matches(gm, dialect.pattern(number, X, -1, 1.0))
    assert (match.bindings["dim"], match.bindings["scale"]) == (1, 2.5)

    def wrong(x, scale: int):
        return F.softmax(x, dim=1) * scale

    explained = str(explain_match(gm, dialect.pattern(wrong, X, 3)))
    assert "0 matches" in explained
    assert "2.5 does not fit the parameter scale: int" in explained


def test_a7_words_and_flags_as_parameters(dialect):
    def pattern(x, approximate: str = "none"):
        return F.gelu(x, approximate=approximate)

    gm = dialect.trace(lambda x: F.gelu(x, approximate="tanh"), X)
    assert [m.bindings["approximate"] for m in find_matches(gm, dialect.pattern(pattern, X))] == ["tanh"]

    def flagged(x, keep: bool):
        return x.sum(-1, keepdim=keep)

    gm = dialect.trace(lambda x: x.sum(-1, keepdim=True), X)
    assert [m.bindings["keep"] for m in find_matches(gm, dialect.pattern(flagged, X, False))] == [True]


def test_a8_two_parameters_may_bind_one_node(dialect):
    def square(x):
        h = x.relu()
        return h * h

    (match,) = find_matches(dialect.trace(square, X), dialect.pattern(lambda x, y: x * y, X, X))
    assert match.bindings["x"] is match.bindings["y"]

    def attention(q, k, v):
        return F.softmax(q @ k.transpose(-1, -2), -1) @ v

    gm = dialect.trace(lambda q, k: F.softmax(q @ k.transpose(-1, -2), -1) @ k, X, X)
    (match,) = find_matches(gm, dialect.pattern(attention, X, X, X))
    assert match.bindings["k"] is match.bindings["v"]


def test_a8_a_parameter_may_bind_none(dialect):
    def pattern(x, w, b):
        return F.linear(x, w, b).relu()

    gm = dialect.trace(lambda x, w: F.linear(x, w).relu(), X, randn(3, 8))
    (match,) = find_matches(gm, dialect.pattern(pattern, X, randn(3, 8), randn(3)))
    assert match.bindings["b"] is None


def test_a9_intermediate_used_elsewhere(dialect):
    gm = dialect.trace(lambda x: (lambda h: (F.gelu(h).neg(), h.cos()))(x.relu()), X)
    found = find_matches(gm, dialect.pattern(lambda x: F.gelu(x.relu()), X))
    assert not found
    ((match, reason),) = found.refused
    assert match.outputs[0].name == "gelu"
    assert reason == "relu: used outside the match by cos"


def test_a9_an_intermediate_that_is_returned(dialect):
    gm = dialect.trace(lambda x: (lambda h: (F.gelu(h), h))(x.relu()), X)
    found = find_matches(gm, dialect.pattern(lambda x: F.gelu(x.relu()), X))
    assert not found
    assert found.refused[0][1] == "relu: used outside the match by output"


def test_a9_cycle(dialect):
    def model(x):
        a = x.relu()
        b = a.sigmoid()
        return b.neg(), a

    gm = dialect.trace(model, X)
    found = find_matches(gm, dialect.pattern(lambda x, y: (x.relu(), y.neg()), X, X))
    assert not found
    assert "make a cycle" in found.refused[0][1]
    assert "sigmoid" in found.refused[0][1]


def test_a9_two_matches_that_would_make_a_cycle_together(dialect):
    def model(x, y):
        a, b = x.relu(), y.relu()
        c, d = b.neg(), a.neg()
        return a, b, c, d

    gm = dialect.trace(model, X, X)
    found = find_matches(gm, dialect.pattern(lambda x, y: (x.relu(), y.neg()), X, X))
    # Each of (a, c) and (b, d) could be one operation, but then each would need a result of the other.
    assert names(found) == [["relu", "neg"]]
    assert any("make a cycle" in reason for match, reason in found.refused if match.anchor.name == "relu_1")


def test_a9_an_input_that_the_match_computes(dialect):
    def square(x):
        h = x.relu()
        return h * h

    gm = dialect.trace(square, X)
    found = find_matches(gm, dialect.pattern(lambda x, y: x.relu() * y, X, X))
    assert not found
    assert found.refused[0][1] == "relu: is the input y of the match that computes it, which would make a cycle"
    gm = dialect.trace(lambda x: x.relu().relu(), X)
    assert not find_matches(gm, dialect.pattern(lambda x, y: (x.relu(), y.relu()), X, X))


def test_a9_in_place_operation_between(dialect):
    def model(x):
        h = x.sigmoid()
        a = h.relu()
        h.add_(1.0)
        return a + h

    gm = dialect.trace(model, X)
    found = find_matches(gm, dialect.pattern(lambda x, y: x.relu() + y, X, X))
    assert not found
    assert found.refused[0][1].startswith("add_: changes in place")


def test_a10_outputs_used_in_part(dialect):
    def model(x, r):
        s = x + r
        return s.relu().neg()

    def pattern(x, r):
        s = x + r
        return s.relu(), s

    (match,) = find_matches(dialect.trace(model, X, X), dialect.pattern(pattern, X, X))
    assert [n.name for n in match.outputs] == ["relu", "add"]


def test_a10_multiple_outputs(dialect):
    def model(x, r, w):
        s = x + r
        return F.layer_norm(s, (8,), w).relu(), s.neg()

    gm = dialect.trace(model, X, X, randn(8))

    def pattern(x, r, w):
        s = x + r
        return F.layer_norm(s, (8,), w), s

    (match,) = find_matches(gm, dialect.pattern(pattern, X, X, randn(8)))
    assert [n.name for n in match.outputs] == ["layer_norm", "add"]
    assert [n.name for n in match.nodes] == ["add", "layer_norm"]


def test_a10_siblings_are_different_nodes(dialect):
    def model(x, a, b, c):
        return F.linear(x, a), F.linear(x, b), F.linear(x, c)

    weights = [randn(8, 8) for _ in range(3)]
    gm = dialect.trace(model, X, *weights)
    (match,) = find_matches(gm, dialect.pattern(model, X, *weights))
    assert [match.bindings[n].name for n in "abc"] == ["a", "b", "c"]
    assert len(match.nodes) == 3


def test_a10_a_result_is_not_another_result_of_the_same_match(dialect):
    def pattern(x, y):
        a = x.relu()
        return a.neg(), y.relu(), a

    def one_relu(x):
        a = x.relu()
        return a.neg(), a

    assert not find_matches(dialect.trace(one_relu, X), dialect.pattern(pattern, X, X))
    (match,) = find_matches(dialect.trace(pattern, X, X), dialect.pattern(pattern, X, X))
    assert len(set(match.outputs)) == 3


def test_a10_a_result_without_users():
    def model(x):
        x.relu().neg()
        return x + 1

    assert len(find_matches(trace(model), lambda x: x.relu().neg())) == 1


def test_a10_back_to_back(dialect):
    gm = dialect.trace(lambda x: x.relu().neg().relu().neg(), X)
    found = find_matches(gm, dialect.pattern(lambda x: x.relu().neg(), X))
    assert names(found) == [["relu", "neg"], ["relu_1", "neg_1"]]


def test_a10_overlap_first_wins(dialect):
    gm = dialect.trace(lambda x: x.relu().relu().relu(), X)
    found = find_matches(gm, dialect.pattern(lambda x: x.relu().relu(), X))
    assert names(found) == [["relu", "relu_1"]]
    ((match, reason),) = found.refused
    assert [n.name for n in match.nodes] == ["relu_1", "relu_2"]
    assert reason == "relu_1: belongs already to the match at relu_1"


def test_a13_module_constraints():
    gm = trace(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, eps=1e-12), nn.LayerNorm(8, bias=False)))

    def targets(pattern: Any) -> list[str]:
        return [m.nodes[0].target for m in find_matches(gm, pattern)]

    assert targets(lambda x: module(nn.LayerNorm, x)) == ["0", "1", "2"]
    assert targets(lambda x: module(nn.LayerNorm, x, eps=1e-12)) == ["1"]
    assert targets(lambda x: module(nn.LayerNorm, x, bias=True)) == ["0", "1"]
    assert targets(lambda x: module(nn.LayerNorm, x, affine=True, bias=False)) == ["2"]
    assert targets(lambda x: module(nn.LayerNorm, x, eps=lambda e: e < 1e-6)) == ["1"]
    assert targets(nn.LayerNorm(1)) == ["0"]
    assert targets(nn.LayerNorm(1, eps=1e-12)) == ["1"]
    assert targets(lambda x: module(nn.LayerNorm, x, heads=3)) == []


def test_a13_settings_of_plain_modules_count():
    gm = trace(nn.Sequential(nn.Dropout(0.5), nn.LeakyReLU(0.2), nn.Conv2d(3, 4, 3, stride=2)))
    assert find_matches(gm, nn.Dropout(0.5))
    assert not find_matches(gm, nn.Dropout(0.1))
    assert find_matches(gm.eval(), nn.Dropout(0.5))  # train or eval is the model's business
    assert not find_matches(gm, nn.LeakyReLU())
    assert find_matches(gm, nn.Conv2d(1, 1, 1, stride=2))
    assert not find_matches(gm, nn.Conv2d(1, 1, 1))
    assert not find_matches(gm, nn.Conv2d(1, 1, 1, stride=2, bias=False))


class TestA14NearMisses:
    def test_another_constant(self, dialect):
        gm = dialect.trace(lambda x: F.softmax(x, dim=0).relu(), X)
        miss = find_matches(gm, dialect.pattern(lambda x: F.softmax(x, dim=-1).relu(), X)).near_misses[0]
        assert (miss.node.name, miss.matched) == ("softmax", 1)
        assert miss.reason == "softmax: dim is 0 where the pattern has -1"

    def test_another_operation(self, dialect):
        gm = dialect.trace(lambda x: F.silu(x).neg(), X)
        miss = find_matches(gm, dialect.pattern(lambda x: F.gelu(x).neg(), X)).near_misses[0]
        assert miss.reason == "silu: is silu where the pattern has gelu"

    def test_another_last_operation(self, dialect):
        gm = dialect.trace(lambda x: F.gelu(x * 2).neg(), X)
        miss = find_matches(gm, dialect.pattern(lambda x: F.gelu(x * 2).cos(), X)).near_misses[0]
        assert (miss.node.name, miss.matched) == ("neg", 2)
        assert miss.reason == "neg: follows gelu where the pattern has cos"

    def test_nothing_alike(self, dialect):
        gm = dialect.trace(lambda x: x + 1, X)
        miss = find_matches(gm, dialect.pattern(lambda x: F.gelu(x), X)).near_misses[0]
        assert miss.reason == "the graph has no gelu, with which the pattern ends"

    def test_extra_user(self, dialect):
        gm = dialect.trace(lambda x: (lambda h: F.gelu(h) + h)(x.relu()), X)
        miss = find_matches(gm, dialect.pattern(lambda x: F.gelu(x.relu()), X)).near_misses[0]
        assert (miss.matched, miss.reason) == (2, "relu: used outside the match by add")

    def test_guard(self, dialect):
        gm = dialect.trace(lambda x: x.relu(), X)
        found = find_matches(
            gm, dialect.pattern(lambda x: x.relu(), X), guard=lambda m: "head_dim=20 is not a multiple of 16"
        )
        assert not found
        assert found.near_misses[0].reason == "relu: guard: head_dim=20 is not a multiple of 16"
        assert len(find_matches(gm, dialect.pattern(lambda x: x.relu(), X), guard=lambda m: True)) == 1
        assert find_matches(gm, dialect.pattern(lambda x: x.relu(), X), guard=lambda m: False).refused

    def test_the_nearest_of_several_is_first(self, dialect):
        gm = dialect.trace(lambda x: (x.cos().neg().relu(), x.sin().neg().relu(), x.tanh().relu()), X)
        misses = find_matches(gm, dialect.pattern(lambda x: x.exp().neg().relu(), X)).near_misses
        assert [m.matched for m in misses] == [2, 2, 1]
        assert misses[0].reason == "cos: is cos where the pattern has exp"

    def test_every_place_is_told(self, dialect):
        def layers(x):
            for _ in range(14):
                x = F.softmax(x, dim=0).relu()
            return x

        found = find_matches(dialect.trace(layers, X), dialect.pattern(lambda x: F.softmax(x, dim=-1).relu(), X))
        assert len(found.near_misses) == 14

    def test_explanation_reads_as_text(self, dialect):
        gm = dialect.trace(lambda x: F.softmax(x, dim=0), X)

        def rows(x):
            return F.softmax(x, dim=-1)

        assert str(explain_match(gm, dialect.pattern(rows, X))) == (
            "rows: 0 matches\n  nearest miss: 0 nodes agreed, then softmax: dim is 0 where the pattern has -1"
        )


def test_a_pattern_is_prepared_once_and_reused(dialect):
    pattern = dialect.pattern(lambda x: x.relu().neg(), X)
    for _ in range(2):
        assert len(find_matches(dialect.trace(lambda x: x.relu().neg(), X), pattern)) == 1
    assert Pattern.of(pattern) is pattern


def test_dims_count_from_the_end_where_the_rank_is_known():
    gm = trace(lambda x: F.softmax(x, dim=2), (X,))
    assert find_matches(gm, lambda x: F.softmax(x, dim=-1), example_inputs=(X,))
    assert find_matches(gm, lambda x: F.softmax(x, dim=-1), example_inputs=(randn(2, 3),))
    assert not find_matches(gm, lambda x: F.softmax(x, dim=-2), example_inputs=(X,))
    gm = trace(lambda x: x.transpose(1, 2), (X,))
    assert find_matches(gm, lambda x: x.transpose(-1, -2), example_inputs=(X,))
    assert find_matches(gm, lambda x: x.transpose(-2, -1), example_inputs=(X,))


def test_a_tensor_pattern_does_not_match_arithmetic_on_sizes():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0] * x.shape[1], -1)

    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(Flat(), (X,), strict=False, dynamic_shapes=(sizes,)).module()
    assert operator.mul in [node.target for node in exported.graph.nodes]
    assert not find_matches(exported, lambda x, y: x * y)
    assert not find_matches(exported, lambda x, y: x * y, example_inputs=(X, X))


def test_an_integer_parameter_binds_a_symbolic_size():
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), -1)

    def rotate_half(x, half: int):
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    sizes = ({2: torch.export.Dim.AUTO},)
    exported = torch.export.export(Split(), (X,), strict=False, dynamic_shapes=sizes).module()
    (match,) = find_matches(exported, rotate_half, example_inputs=(randn(2, 3, 6), 3))
    assert match.bindings["half"].target is operator.floordiv
    (match,) = find_matches(trace(Split(), (X,)), rotate_half, example_inputs=(randn(2, 3, 6), 3))
    assert match.bindings["half"] == 4


def test_bad_patterns_are_named():
    with pytest.raises(ValueError, match="pattern unused: parameter y is not used"):
        Pattern.of(unused)
    with pytest.raises(ValueError, match="returns x, which it does not compute"):
        Pattern.of(lambda x: x)
    with pytest.raises(TypeError, match=r"gm must be a torch\.fx\.GraphModule"):
        find_matches(nn.ReLU(), lambda x: x.relu())
    with pytest.raises(TypeError, match="pattern must be a function"):
        Pattern.of("relu")
    with pytest.raises(TypeError, match="only has a meaning inside a pattern"):
        call_module("fc1", X)
    with pytest.raises(ValueError, match="is not a regular expression"):
        call_module("fc(", X)


def unused(x, y):
    return x.relu()
