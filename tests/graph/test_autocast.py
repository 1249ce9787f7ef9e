"""Autocast spelled out: the same bits without autocast as before under it, whatever operator it does something to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from burnish.graph.autocast import make_casts_explicit


def explicit(fn: Callable[..., Any], *inputs: Tensor, enabled: bool = True) -> tuple[fx.GraphModule, int]:
    """The function traced under autocast to bfloat16 (or not), with its casts."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            graph = make_fx(fn, pre_dispatch=True)(*fakes)
            return graph, make_casts_explicit(graph, fakes)


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def same(one: Any, other: Any) -> bool:
    """To the bit, and of the same dtypes."""
    pairs = list(zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (8,)), w, b)), w)


def attention(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x @ w).view(2, 3, 2, 4).transpose(1, 2), x.view(2, 3, 2, 4).transpose(1, 2), b.view(1, 1, 1, 8)[..., :4]
    scores = q @ k.transpose(-1, -2)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True), scores.softmax(-1) @ k + v, torch.cat([q, k])


def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy((x @ w).flatten(0, 1), torch.zeros(6, dtype=torch.long)) + F.mse_loss(x @ w, x)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8)


@pytest.mark.parametrize("fn", [mlp, attention, loss])
def test_the_same_bits(fn: Callable[..., Any]) -> None:
    given = inputs()
    graph, count = explicit(fn, *given)
    assert count > 0
    with torch.autocast("cpu", torch.bfloat16):
        expected = fn(*given)
        again = graph(*given)  # casts of what is cast already do nothing
    assert same(graph(*given), expected)
    assert same(again, expected)


def test_each_tensor_is_cast_once() -> None:
    graph, count = explicit(mlp, *inputs())
    assert count == 3, "the norm's result, the weight of both products, the bias"
    assert targets(graph).count(torch.ops.aten.to.dtype) == 3


def test_values_are_what_the_nodes_compute() -> None:
    given = inputs()
    graph, _ = explicit(mlp, *given)

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                assert result.dtype == n.meta["val"].dtype, n
            return result

    Compare(graph).run(*given)


def regions(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        first = x @ w
        with torch.autocast("cpu", enabled=False):
            second = x @ w
        third = first @ w
    return first, second, third, x @ w


@pytest.mark.parametrize("enabled", [False, True])
def test_regions_that_the_graph_enters_itself(enabled: bool) -> None:
    given = inputs()
    graph, _ = explicit(regions, *given, enabled=enabled)
    assert autocast_mode._enter_autocast not in targets(graph)
    assert autocast_mode._exit_autocast not in targets(graph)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        expected = regions(*given)
    assert [t.dtype for t in expected[:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert same(graph(*given), expected)


def test_nothing_is_left_behind() -> None:
    with FakeTensorMode() as mode:  # and no autocast around it, which would put back what it found
        fakes = [mode.from_tensor(x) for x in inputs()]
        make_casts_explicit(make_fx(regions, pre_dispatch=True)(*fakes), fakes)
    assert torch.is_autocast_cache_enabled()
    assert not torch._C._is_any_autocast_enabled()


def test_no_casts_without_autocast() -> None:
    graph, count = explicit(mlp, *inputs(), enabled=False)
    assert count == 0
    assert torch.ops.aten.to.dtype not in targets(graph)


def test_what_no_cast_explains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.graph.autocast._dtypes", lambda result: [object()])
    with pytest.raises(ValueError, match=r"autocast does something to aten.layer_norm.default that no cast"):
        explicit(mlp, *inputs())
