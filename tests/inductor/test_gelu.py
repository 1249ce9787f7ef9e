"""GELU between linear layers in `torch.compile(backend="burnish")`: part of the product that comes before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from burnish.inductor import backend, gelu
from burnish.inductor.decompositions import expand_gelu
from burnish.numerics import assert_close, randn
from burnish.ops import linear_with_preactivation
from burnish.tuning import Tuner

pytestmark = pytest.mark.usefixtures("untimed")
D, INNER = 16, 64
FORWARD = "burnish.linear_with_preactivation.default"
BACKWARD = "burnish.linear_gelu_backward.default"
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def graphs(graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """As if there were kernels for the CPU."""
    monkeypatch.setattr(gelu, "_why_not", lambda *args: [])
    return graphs


def targets(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    """x of these sizes, and weights and biases of two linear layers."""
    up, down = randn(INNER, D, seed=1) / D**0.5, randn(D, INNER, seed=2) / INNER**0.5
    return tuple(t.to(dtype) for t in (randn(*shape, D), up, randn(INNER, seed=3), down, randn(D, seed=4)))


def mlp(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, bias)


def check(fn: Callable[..., Tensor], *given: Tensor, any_rows: bool = False, **options: Any) -> None:
    """Compiled results and gradients of all inputs, by the rule; with `any_rows` in a graph for any number of them."""
    compiled = torch.compile(fn, backend="burnish", fullgraph=True, **options)
    found = []
    for run, dtype in ((compiled, None), (fn, None), (fn, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in given]
        if any_rows:
            for dim in range(leaves[0].dim() - 1):
                torch._dynamo.mark_dynamic(leaves[0], dim)
        result = run(*leaves)
        result.backward(randn(*result.shape, seed=99).to(result.dtype))
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    assert_close(*found)


@HALF
@pytest.mark.parametrize("any_rows", [False, True])
@pytest.mark.parametrize("shape", [(9,), (2, 5)], ids=str)
def test_the_backward_pass_is_one_op(
    graphs: list[fx.Graph], shape: tuple[int, ...], any_rows: bool, dtype: torch.dtype
) -> None:
    check(mlp, *inputs(dtype, *shape), any_rows=any_rows)
    forward, backward = map(targets, graphs)
    assert forward[FORWARD] == 1
    assert forward["aten.addmm.default"] == 1, "of the second layer"
    assert backward[BACKWARD] == 1
    assert not [name for name in backward if "gelu" in name and name != BACKWARD]
    assert backward["aten.mm.default"] == 3, "gradients of both weights and of x"
    assert backward["aten.sum.dim_IntList"] == 1, "of the second layer's bias; the first one's comes out of the Op"


def test_under_autocast(graphs: list[fx.Graph]) -> None:
    def run(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=given[0].dtype == torch.float32):
            return mlp(*given)

    check(run, *inputs(torch.float32, 2, 5))
    (fused,) = (node for node in graphs[-1].nodes if str(node.target) == BACKWARD)
    (total,) = (user for user in fused.users if user.args[1] == 2)
    assert not total.users, "the bias's gradient is in float32 as it comes; the copy of the graph has no output"
    assert targets(graphs[-1])["aten.sum.dim_IntList"] == 1


def test_the_tanh_approximation(graphs: list[fx.Graph]) -> None:
    def fn(*given: Tensor) -> Tensor:
        x, up, bias, down, _ = given
        return F.linear(F.gelu(F.linear(x, up, bias), approximate="tanh"), down)

    check(fn, *inputs(torch.bfloat16, 9)[:4], torch.zeros(1))
    (fused,) = (node for node in graphs[-1].nodes if str(node.target) == BACKWARD)
    assert fused.args[3:] == ("gelu_tanh", True)


@pytest.mark.parametrize("recompute", [True, False])
def test_gelu_is_worked_out_again_where_it_was_not_kept(graphs: list[fx.Graph], recompute: bool) -> None:
    check(mlp, *inputs(torch.bfloat16, 9), options={"burnish.recompute": recompute})
    (fused,) = (node for node in graphs[-1].nodes if str(node.target) == BACKWARD)
    assert fused.args[4] == recompute


@pytest.mark.parametrize("shape", [(9,), (2, 5)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_what_the_kernel_was_not_chosen_for_is_taken_apart(
    graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], biased: bool, kernel: bool
) -> None:
    found: list[Counter[str]] = []

    def choose(graph_module: fx.GraphModule, tuner: Tuner) -> None:
        for node in graph_module.graph.find_nodes(op="call_function", target=linear_with_preactivation.overload):
            node.kwargs = {"impl": "gluon BLOCK_M=128" if kernel else "torch"}
        found.append(targets(graph_module.graph))

    def expand(graph_module: fx.GraphModule) -> None:
        graph_module.graph.lint()
        found.append(targets(graph_module.graph))
        expand_gelu(graph_module)

    monkeypatch.setattr(backend, "choose_impls", choose)
    monkeypatch.setattr(backend, "expand_gelu", expand)
    x, up, up_bias, down, bias = inputs(torch.bfloat16, *shape)
    if biased:
        check(mlp, x, up, up_bias, down, bias)
    else:
        check(lambda x, up, down, bias: mlp(x, up, None, down, bias), x, up, down, bias)
    put, left, *_ = found
    assert (put[FORWARD], left[FORWARD]) == (1, int(kernel))
    assert left["aten.gelu.default"] == int(not kernel)
    assert put["aten.addmm.default"] == 1
    assert left["aten.addmm.default"] + left["aten.mm.default"] == 2 - int(kernel)


def test_without_gradients_nothing_is_kept(graphs: list[fx.Graph]) -> None:
    given = inputs(torch.bfloat16, 9)
    with torch.no_grad():
        result = torch.compile(mlp, backend="burnish", fullgraph=True)(*given)
        assert_close(result, mlp(*given), mlp(*(t.double() for t in given)))
    assert FORWARD not in targets(graphs[-1])


def of_two_readers(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, _: Tensor) -> Tensor:
    """GELU's result goes elsewhere, too: its gradient is a sum."""
    hidden = F.gelu(F.linear(x, up, bias))
    return F.linear(hidden, down) + hidden.sum(-1, keepdim=True)


def of_no_product(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, _: Tensor) -> Tensor:
    return F.gelu(F.linear(x, up, bias)).sin() * down.sum()


@pytest.mark.parametrize("fn", [of_two_readers, of_no_product])
def test_other_gradients_are_left(graphs: list[fx.Graph], fn: Callable[..., Tensor]) -> None:
    check(fn, *inputs(torch.bfloat16, 9)[:4], torch.zeros(1))
    assert BACKWARD not in targets(graphs[-1])


def test_float32_is_left(graphs: list[fx.Graph]) -> None:
    check(mlp, *inputs(torch.float32, 9))
    assert not {FORWARD, BACKWARD} & (targets(graphs[0]) | targets(graphs[1])).keys()


def test_without_a_kernel_it_is_left(graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu, "_why_not", lambda *args: ["the inputs are on cpu"])
    check(mlp, *inputs(torch.bfloat16, 9))
    assert not {FORWARD, BACKWARD} & (targets(graphs[0]) | targets(graphs[1])).keys()


def test_a_gradient_that_needs_gelus_result(graphs: list[fx.Graph]) -> None:
    """Then it cannot come out of the Op, which takes that gradient."""

    def fn(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, _: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, bias)), down).cos().square()

    def again(*given: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(fn, *given, use_reentrant=False)
        return result

    check(again, *inputs(torch.bfloat16, 9)[:4], torch.zeros(1))
    (fused,) = (node for node in graphs[-1].nodes if str(node.target) == BACKWARD)
    assert fused.args[4] is False


def test_gelu_within_branches(graphs: list[fx.Graph]) -> None:
    """Graphs that a graph calls have their GELU taken apart, too."""

    def fn(x: Tensor, up: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda t: F.gelu(F.linear(t, up)), lambda t: F.linear(t, up), (x,))
        return result

    x, up, *_ = inputs(torch.bfloat16, 9)
    with torch.no_grad():
        result = torch.compile(fn, backend="burnish", fullgraph=True)(x, up)
        assert_close(result, fn(x, up), fn(x.double(), up.double()))
