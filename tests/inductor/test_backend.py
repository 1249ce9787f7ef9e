"""`torch.compile(model, backend="burnish")`: the same rewrites on Dynamo's graphs, then Inductor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish import ops
from burnish.inductor import backend
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.record import StepRecord
from tests import zoo
from tests.e2e.float64 import gradients, gradients_in_float64, loss, outputs_in_float64
from tests.zoo.plain import GatedMLP

SHAPES = ((2, 8), (3, 12), (4, 16))


class Seen:
    """A backend that rewrites and compiles nothing further; it keeps what it made."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.records: list[list[StepRecord]] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewritten, records = backend.rewrite(graph_module, example_inputs)
        self.graphs.append(rewritten)
        self.records.append(records)
        return rewritten

    @property
    def ops(self) -> Counter[str]:
        """The Ops of the last graph."""
        return ops_in(self.graphs[-1])


def ops_in(graph_module: fx.GraphModule) -> Counter[str]:
    return Counter(op.name for node in graph_module.graph.nodes if (op := op_of(node.target)) is not None)


@pytest.fixture
def seen() -> Seen:
    torch._dynamo.reset()
    return Seen()


def assert_right(compiled: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        result, eager = compiled(**inputs), model(**inputs)
    assert type(result) is type(eager)
    assert_close(pytree.tree_leaves(result), pytree.tree_leaves(eager), outputs_in_float64(model, (), inputs))


# Per layer: weights are inputs of Dynamo's graphs, so q, k, v and a gated MLP's products stay apart.
OPS = {
    "bert-sdpa-mask": {"attention": 2, "linear": 13, "add_layer_norm": 4, "embedding_layer_norm": 1},
    "llama-sdpa": {"attention": 2, "linear": 15, "rope_qk": 2, "rope_tables": 1, "rms_norm": 1, "add_rms_norm": 4},
    "gpt2-sdpa": {"attention": 2, "linear": 9, "layer_norm": 1, "add_layer_norm": 4},
    "nanogpt-manual": {"attention": 2, "linear": 9, "layer_norm": 1, "add_layer_norm": 4},
}


@pytest.mark.parametrize("case", zoo.params(*OPS))
def test_the_same_rewrites_at_every_size(case: zoo.Case, seen: Seen) -> None:
    model = case.build()
    compiled = torch.compile(model, backend=seen)
    for shape in SHAPES:
        assert_right(compiled, model, case.inputs(*shape, torch.float32))
    assert len(seen.graphs) == 2, "one for the first size, one for all others"
    assert [ops_in(graph) for graph in seen.graphs] == [Counter(OPS[case.name])] * 2
    assert [record.name for record in seen.records[-1]] == ["raise", "fuse"]


def test_gradients_are_the_models(seen: Seen) -> None:
    case = zoo.CASES["bert-sdpa-mask"]
    model = zoo.without_dropout(case.build()).train()
    inputs = case.inputs(2, 8, torch.float32)
    found = []
    for run in (torch.compile(model, backend=seen), model):
        model.zero_grad()
        loss(run(**inputs)).backward()
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert seen.ops["attention"] == 2
    assert_close(*found, gradients_in_float64(model, inputs))


class Branching(nn.Module):
    """What export refuses: the sum decides how it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.norm(self.second(x)) if x.sum() > 0 else x


def test_a_model_that_export_refuses_is_rewritten_in_parts(seen: Seen) -> None:
    model = zoo.seeded(Branching())
    compiled = torch.compile(model, backend=seen)
    assert_right(compiled, model, {"x": torch.randn(2, 5, 16)})
    assert [ops_in(graph) for graph in seen.graphs] == [Counter(linear=1), Counter(linear=1, layer_norm=1)]
    activations = [n.args[3] for n in seen.graphs[0].graph.nodes if n.target is ops.linear.overload]
    assert activations == ["relu"]


def test_a_graph_without_dynamo_around_it() -> None:
    model, x = zoo.seeded(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))), torch.randn(2, 16)
    rewritten, _ = backend.rewrite(fx.symbolic_trace(model), [x])
    assert ops_in(rewritten) == Counter(linear=1, layer_norm=1)
    with torch.no_grad():
        assert_close(rewritten(x), model(x), outputs_in_float64(model, (x,))[0])


# --- Inductor ---


@pytest.mark.parametrize(
    ("settings", "patches"),
    [
        ({}, None),
        ({"options": {"max_fusion_size": 7}}, {"max_fusion_size": 7}),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
        ({"mode": "default"}, None),
    ],
)
def test_settings_reach_inductor(
    settings: dict[str, Any], patches: dict[str, Any] | None, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def compile_fx(
        graph_module: fx.GraphModule, inputs: list[Any], config_patches: Any = None, **rest: Any
    ) -> fx.GraphModule:
        given.append((ops_in(graph_module), config_patches))
        return graph_module

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    model = zoo.seeded(GatedMLP(16, 24, "silu", bias=False))
    compiled: Any = torch.compile(model, backend=backend.backend, **settings)
    with torch.no_grad():
        compiled(torch.randn(2, 16))
    ((found, config_patches),) = given
    assert found == Counter(linear=3)
    assert config_patches == patches or config_patches.items() >= (patches or {}).items()


@pytest.mark.slow
def test_inductor_compiles_what_was_rewritten(seen: Seen) -> None:
    case = zoo.CASES["llama-sdpa"]
    model = case.build()
    compiled: Any = torch.compile(model, backend=backend.backend)
    for shape in SHAPES[:2]:
        assert_right(compiled, model, case.inputs(*shape, torch.float32))
