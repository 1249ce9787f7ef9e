"""What a model compiled for training keeps in memory and copies: activations computed again, weights where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import burnish
from burnish import ops
from burnish.inductor import backend
from burnish.inductor.decompositions import gelu_decompositions
from burnish.lower import op_of
from burnish.numerics import assert_close, randn
from tests import zoo
from tests.e2e.float64 import gradients, gradients_in_float64
from tests.zoo.case import token_ids
from tests.zoo.hugging_face import llama_like

pytestmark = pytest.mark.usefixtures("untimed")


class Half(nn.Module):
    """The feed-forward half of a GPT's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


class Block(Half):
    """With a loss."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


class Inner:
    """In place of Inductor: what it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.static: list[list[int]] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Any, **given: Any) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        self.static.append(list(given["static_input_idxs"]))
        run: Callable[..., Any] = graph_module.forward
        return run


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Inner:
    torch._dynamo.reset()
    found = Inner()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", found)
    return found


def entries_kept(forward: fx.GraphModule) -> list[tuple[int, ...]]:
    """The sizes of the activations that the forward graph leaves for the backward one."""
    (outputs,) = forward.graph.output_node().args
    made = {node for node in outputs[1:] if isinstance(node, fx.Node) and node.op != "placeholder"}  # type: ignore[index,union-attr]
    return sorted(tuple(node.meta["val"].shape) for node in made if node.meta["val"].shape[0] == 32)


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_and_norms_are_computed_again(inner: Inner, recompute: bool) -> None:
    model, x = zoo.seeded(Block()), randn(32, 16, outliers=0.0)
    found = []
    for run in (torch.compile(model, backend="burnish", options={"burnish.recompute": recompute}), model):
        model.zero_grad()
        run(x).backward()
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert_close(*found, gradients_in_float64(model, {"x": x}))
    wide = [size for size in entries_kept(inner.graphs[0]) if size == (32, 64)]
    assert len(wide) == (1 if recompute else 2), "what GELU is of, and its result"


def test_weights_stay_where_they_are(inner: Inner) -> None:
    model = zoo.seeded(Block())
    torch.compile(model, backend="burnish")(randn(32, 16)).backward()
    placeholders = inner.graphs[0].graph.find_nodes(op="placeholder")
    moving = [node.meta["val"].shape for i, node in enumerate(placeholders) if i not in inner.static[0]]
    assert moving == [(32, 16)], "CUDA graphs copy what is not static"


def test_casts_of_weights_are_kept(inner: Inner) -> None:
    model = zoo.seeded(Block())
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(model, backend="burnish")(randn(32, 16, outliers=0.0))
    loss.backward()
    backward = inner.graphs[1].graph
    given = [node.meta["val"] for node in backward.find_nodes(op="placeholder")]
    assert {(64, 16), (16, 64)} <= {tuple(value.shape[-2:]) for value in given if value.dtype == torch.bfloat16}
    cast = backward.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
    assert not [node for node in cast if node.args[0].op == "placeholder" and node.args[0].name.startswith("primals")]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_hugging_faces_mask_is_causality(batch: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    seen: list[list[Any]] = []

    def note(graph_module: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        rewritten, _ = backend.rewrite(graph_module, example_inputs)
        found = [n for n in rewritten.graph.nodes if n.op == "call_function" and op_of(n.target) is ops.attention]
        seen.extend(list(ops.attention.bind(*n.args, **n.kwargs))[3:6] for n in found)
        return rewritten

    model, ids = zoo.seeded(llama_like()), token_ids(batch, 12, 32)
    with torch.no_grad():
        run = torch.compile(model, backend=note, dynamic=dynamic)
        result, eager, exact = run(input_ids=ids).logits, model(input_ids=ids).logits, model.double()(input_ids=ids)
    assert_close(result, eager, exact.logits)
    assert seen
    assert all(given == [None, None, True] for given in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gelu_by_one_polynomial(dtype: torch.dtype) -> None:
    x = torch.cat([randn(4000, dtype=dtype), torch.linspace(-12, 6, 2000).to(dtype)])
    grad, table, aten = randn(6000, dtype=dtype, seed=1), gelu_decompositions(), torch.ops.aten
    exact = x.double().requires_grad_()
    F.gelu(exact).backward(grad.double())
    assert_close(table[aten.gelu.default](x), F.gelu(x), F.gelu(exact).detach())
    eager = aten.gelu_backward(grad, x)
    assert_close(table[aten.gelu_backward.default](grad, x), eager, exact.grad)
    half = (table[operator](*args, approximate="tanh") for operator, args in ((aten.gelu.default, (x,)),))
    assert_close(*half, F.gelu(x, approximate="tanh"), F.gelu(x.double(), approximate="tanh"))


def test_a_schedules_checkpoints_are_in_the_graph(inner: Inner) -> None:
    model, x = zoo.seeded(nn.Sequential(Half(), Half())).train(), randn(32, 16, outliers=0.0)
    kept = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        schedule = burnish.create_schedule(model)
        if checkpointed:
            schedule.find_all("*").checkpoint()
        torch.compile(schedule.build(), backend="burnish", fullgraph=True)(x).sum().backward()
        kept.append(entries_kept(inner.graphs[-2]))
    assert (32, 64) in kept[0]
    assert kept[1] == [(32, 16)], "what the second half gets"
