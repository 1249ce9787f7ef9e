"""Walks through a graph: what they compute, when values go, and how rounds are chosen."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from burnish.capture import capture
from burnish.report.timing import fastest, in_turns, take_times
from burnish.report.walk import Walk


class Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.exp() + 1).tanh()


X = torch.randn(3, 4)


def test_a_value_goes_after_its_last_use() -> None:
    graph_module = capture(Model(), (X,)).captured
    alive: list[weakref.ref[Tensor]] = []
    left: dict[str, list[bool]] = {}

    def visit(node: fx.Node, run: Any, args: Any, kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        alive.append(weakref.ref(result))
        return result

    def done(node: fx.Node) -> None:
        left[node.name] = [each() is not None for each in alive]

    (out,) = Walk(graph_module)([X], visit, done)
    assert torch.equal(out, Model()(X))
    assert left["exp"] == [True]
    assert left["add"] == [False, True]
    assert left["tanh"] == [False, False, True]


def test_functions_take_the_place_of_targets() -> None:
    graph_module = capture(Model(), (X,)).captured
    exp = next(node for node in graph_module.graph.nodes if node.name == "exp")
    (out,) = Walk(graph_module, {exp: torch.sin})([X], lambda node, run, args, kwargs: run(*args, **kwargs))
    assert torch.equal(out, (X.sin() + 1).tanh())


def test_the_third_that_took_least() -> None:
    assert fastest([5.0, 1.0, 4.0, 2.0, 3.0], float) == [1.0, 2.0]
    assert fastest([7.0], float) == [7.0]


def test_calls_in_turns() -> None:
    order: list[str] = []
    times = in_turns((lambda: order.append("a"), lambda: order.append("b")), cuda=False, seconds=0.0)
    assert order == ["a", "b"] * 3
    assert len(times) == 2
    assert all(us > 0 for us in times)


def test_every_node_is_timed() -> None:
    graph_module = capture(Model(), (X,)).captured
    calls: list[int] = []
    times = take_times(Walk(graph_module), [X], lambda: calls.append(1), cuda=False, seconds=0.0)
    assert len(calls) == 3, "at least"
    assert {node.name for node in times.node_us} == {"exp", "add", "tanh"}
    assert all(us > 0 for us in times.node_us.values())
    assert 0 < times.end_to_end_us <= times.median_us
