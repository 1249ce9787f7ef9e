"""Every spelling of one operation is one call."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn, randn

from burnish.graph import trace
from burnish.graph.normalize import Call, canonical

X = randn(2, 4, 8)


def call_of(fn: Any, *inputs: Any) -> Call:
    """The last call of a function, its inputs written as "x"."""
    gm = trace(fn, inputs or None)
    node = [n for n in gm.graph.nodes if n.op.startswith("call")][-1]
    call = canonical(node, gm)
    return Call(call.key, {name: fx.node.map_arg(value, lambda n: "x") for name, value in call.args.items()})


SPELLINGS: list[list[Any]] = [
    [lambda x: x.relu(), lambda x: F.relu(x), lambda x: torch.relu(x), lambda x: F.relu(input=x), nn.ReLU()],
    [lambda x: x + 1, lambda x: torch.add(x, 1), lambda x: x.add(1), lambda x: torch.add(input=x, other=1, alpha=1)],
    [lambda x: x - 2.0, lambda x: torch.sub(x, 2.0), lambda x: x.sub(2.0), lambda x: operator.sub(x, 2.0)],
    [lambda x: 2.0 - x, lambda x: torch.rsub(x, 2.0), lambda x: torch.sub(2.0, x)],
    [lambda x: x * 3, lambda x: torch.mul(x, 3), lambda x: x.multiply(3)],
    [lambda x: x / 3, lambda x: torch.div(x, 3), lambda x: x.true_divide(3), lambda x: x.div(3, rounding_mode=None)],
    [lambda x: x @ x, lambda x: torch.matmul(x, x), lambda x: x.matmul(x)],
    [
        lambda x: x.softmax(-1),
        lambda x: F.softmax(x, dim=-1),
        lambda x: torch.softmax(x, -1),
        lambda x: F.softmax(x, -1, 3, None),
    ],
    [lambda x: x.transpose(1, 2), lambda x: torch.transpose(x, dim0=1, dim1=2), lambda x: x.swapaxes(1, 2)],
    [lambda x: x.permute(0, 2, 1), lambda x: x.permute((0, 2, 1)), lambda x: torch.permute(x, [0, 2, 1])],
    [lambda x: x.view(2, 32), lambda x: x.view((2, 32)), lambda x: x.view([2, 32])],
    [lambda x: x.reshape(8), lambda x: x.reshape((8,)), lambda x: torch.reshape(x, (8,))],
    [lambda x: x.mean(-1), lambda x: x.mean(dim=[-1]), lambda x: torch.mean(x, (-1,)), lambda x: x.mean(axis=-1)],
    [lambda x: x.sum(1, True), lambda x: torch.sum(x, dim=1, keepdim=True)],
    [lambda x: F.dropout(x, 0.1), lambda x: F.dropout(x, p=0.1, training=True), lambda x: torch.dropout(x, 0.1, True)],
    [lambda x: F.gelu(x, approximate="tanh"), lambda x: torch._C._nn.gelu(x, approximate="tanh")],
    [lambda x: F.layer_norm(x, (8,)), lambda x: torch.layer_norm(x, (8,), None, None, 1e-5, False)],
    [lambda x: x[:, 0:4], lambda x: x[:, :4], lambda x: x[:, :4:1]],
    [lambda x: x.shape, lambda x: x.size()],
    [lambda x: -x, lambda x: x.neg(), lambda x: torch.negative(x)],
    [lambda x: x & x, lambda x: torch.bitwise_and(x, x), lambda x: operator.and_(x, x)],
    [lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU(0.2)],
    [lambda x: F.gelu(x), nn.GELU()],
    [lambda x: torch.flatten(x, 1), lambda x: x.flatten(start_dim=1), nn.Flatten()],
    [lambda x: torch.cat([x, x], 1), lambda x: torch.concat((x, x), dim=1)],
]


def _name(spellings: list[Any]) -> str:
    return str(call_of(spellings[0]).key)


@pytest.mark.parametrize("spellings", SPELLINGS, ids=_name)
def test_one_call_for_every_spelling(spellings):
    first, *others = [call_of(s) for s in spellings]
    for other in others:
        assert other.key == first.key
        assert _plain(other.args) == _plain(first.args)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("symbolic", "aten"),
    [
        (lambda x: x.relu(), lambda x: x.relu()),
        (lambda x: x + 1, lambda x: 1 + x),
        (lambda x: x.softmax(-1), lambda x: F.softmax(x, -1)),
        (lambda x: F.layer_norm(x, (8,)), lambda x: F.layer_norm(x, [8])),
        (lambda x: F.gelu(x), lambda x: F.gelu(x)),
        (lambda x: x.permute(0, 2, 1), lambda x: torch.permute(x, (0, 2, 1))),
        (lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.5)),
        (lambda x: torch.sub(2.0, x), lambda x: 2.0 - x),
        (lambda x: x.pow(2), lambda x: x**2),
    ],
)
def test_both_dialects_have_one_spelling(symbolic, aten):
    ours, theirs = call_of(symbolic), call_of(aten, X)
    assert ours.key == theirs.key
    assert _plain(ours.args) == _plain(theirs.args)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: F.relu(x), lambda x: F.relu(x, inplace=True)),
        (nn.ReLU(), nn.ReLU(inplace=True)),
        (lambda x: x.add(1), lambda x: x.add_(1)),
        (lambda x: x.max(), lambda x: x.max(1)),
        (lambda x: x.div(2), lambda x: x.div(2, rounding_mode="floor")),
        (lambda x: x.view(8), lambda x: x.reshape(8)),
        (lambda x: x.split(2), lambda x: x.chunk(2)),
    ],
)
def test_different_operations_stay_different(one, other):
    ours, theirs = call_of(one), call_of(other)
    assert (ours.key, set(ours.args)) != (theirs.key, set(theirs.args))


def test_a_function_of_ones_own_is_itself():
    def custom(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(custom, (x,)), graph.call_function(custom, (), {"x": x, "scale": 2.0})))
    gm = fx.GraphModule(nn.Module(), graph)
    first, second = (canonical(n, gm) for n in gm.graph.nodes if n.op == "call_function")
    assert first == second == Call(custom, {"x": x, "scale": 2.0})


def test_functions_that_only_share_a_name_with_an_operator():
    call = call_of(lambda x: F.embedding(x, x))
    assert call.key == "torch.nn.functional.embedding"
