"""Tracing with little overhead: the same graphs, and everything as it was afterwards."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from burnish import capture_overhead
from burnish.capture import CaptureError, capture
from burnish.capture_overhead import little_overhead


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + torch.nn.functional.gelu(x)


def test_source_lines_are_those_that_torch_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> list[Any]:
        program = capture(Model(), (torch.randn(2, 4),))
        return [(node.name, node.meta.get("stack_trace")) for node in program.captured.graph.nodes]

    mine = lines()
    monkeypatch.setattr("burnish.capture.little_overhead", contextlib.nullcontext)
    assert mine == lines()
    assert any("return self.layers(x)" in trace for _, trace in mine if trace)


def test_graphs_made_meanwhile_run() -> None:
    x = torch.randn(3)
    with little_overhead():
        made = fx.symbolic_trace(lambda x: x.sin() + 1)
        assert torch.equal(made(x), x.sin() + 1)
        other = fx.symbolic_trace(lambda x: x.cos())
    assert torch.equal(other(x), x.cos())
    assert "cos" in other.code


def settings() -> list[Any]:
    config = torch._dynamo.config
    traceback = vars(fx.proxy)["CapturedTraceback"]
    return [fx.GraphModule.recompile, traceback, gc.isenabled(), config.fake_tensor_cache_enabled]


@pytest.mark.parametrize("collects", [True, False])
def test_settings_are_as_before(collects: bool) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        before = settings()
        capture(Model(), (torch.randn(2, 4),))
        assert settings() == before
        with pytest.raises(CaptureError, match="not today"):
            capture(Wrong(), (torch.randn(2, 4),))
        assert settings() == before
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("proxy", SimpleNamespace()),
        ("fx", SimpleNamespace(GraphModule=type("GraphModule", (), {}))),
    ],
    ids=["CapturedTraceback", "recompile"],
)
def test_a_torch_without_what_is_exchanged(name: str, without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def graph() -> list[str]:
        captured = capture(Model(), (torch.randn(2, 4),)).captured
        return [f"{node} {node.meta.get('stack_trace')}" for node in captured.graph.nodes]

    known = graph()
    monkeypatch.setattr(capture_overhead, name, without)
    assert graph() == known


def test_a_torch_without_the_cache_of_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._dynamo.config", SimpleNamespace())
    with capture_overhead._cache_not_filled():
        pass
