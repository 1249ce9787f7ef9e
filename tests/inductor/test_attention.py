"""Attention's gradients in `torch.compile(backend="burnish")`: side by side where one product gave q, k and v."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.inductor.attention import pack_gradients
from burnish.numerics import assert_close, randn
from burnish.ops import attention_with_logsumexp

pytestmark = pytest.mark.usefixtures("untimed")
B, L, H, D = 2, 9, 4, 8
C = H * D
APART, PACKED = "burnish.attention_backward.default", "burnish.attention_backward_packed.default"
Heads = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def targets(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def packed(graph: fx.Graph) -> fx.Node:
    (node,) = [node for node in graph.nodes if str(node.target) == PACKED]
    return node


def heads_first(*projected: Tensor) -> tuple[Tensor, ...]:
    """Each of (B, L, heads * D)."""
    return tuple(t.unflatten(-1, (-1, D)).transpose(1, 2) for t in projected)


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=not kwargs, enable_gqa=grouped, **kwargs).transpose(1, 2)


def check(fn: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    """Compiled gradients of all inputs, by the rule."""
    compiled = torch.compile(fn, backend="burnish", fullgraph=True, **options)
    found = []
    for run, dtype in ((compiled, inputs[0].dtype), (fn, inputs[0].dtype), (fn, torch.float64)):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
        result = run(*leaves)
        result.backward(randn(*result.shape, seed=99).to(dtype))
        found.append([leaf.grad for leaf in leaves])
    assert_close(*found)


def inputs(width: int = 3 * C, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, and weight and bias of a product to `width` columns."""
    weight = randn(width, C, seed=1, dtype=dtype) * C**-0.5
    return randn(B, L, C, seed=0, dtype=dtype), weight, randn(width, seed=2, dtype=dtype)


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    return heads_first(*qkv.split(C, dim=-1))


def unbound(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in qkv.view(*qkv.shape[:2], 3, H, D).unbind(2))


def of_tokens(qkv: Tensor) -> tuple[Tensor, ...]:
    return heads_first(*(t.unflatten(0, (B, L)) for t in qkv.flatten(0, 1).split(C, dim=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [split, unbound, of_tokens])
def test_side_by_side(graphs: list[fx.Graph], heads: Heads, dtype: torch.dtype) -> None:
    check(lambda x, weight, bias: attend(*heads(F.linear(x, weight, bias))), *inputs(dtype=dtype))
    found = targets(graphs[1])
    assert found[PACKED] == 1
    assert not found[APART]
    assert not found["aten.cat.default"]


def test_grouped_heads_in_several_layers(graphs: list[fx.Graph]) -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        for _ in range(2):
            qkv = F.linear(x, weight, bias)
            x = x + attend(*heads_first(*qkv.split([C, C // 2, C // 2], dim=-1))).flatten(2)
        return x

    check(fn, *inputs(2 * C))
    assert targets(graphs[1])[PACKED] == 2


def test_any_batch_and_length(graphs: list[fx.Graph]) -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return attend(*split(F.linear(x, weight)))

    given = inputs()[:2]
    check(fn, *given)
    check(fn, given[0][:1].repeat(3, 2, 1), given[1])  # of other sizes: dynamic from now on
    check(fn, given[0][:, 1:].repeat(2, 3, 1), given[1])
    assert [targets(graph)[PACKED] for graph in graphs] == [0, 1, 0, 1], "nothing is compiled for the third sizes"
    node = packed(graphs[3])
    (view,) = [user for user in node.users if user.target is torch.ops.aten.view.default]
    for size, whole in zip(view.meta["val"].shape[:2], node.meta["val"].shape[:2], strict=True):
        assert isinstance(size, torch.SymInt)
        assert size.node.expr == whole.node.expr


def test_any_number_of_heads_is_left_alone(graphs: list[fx.Graph]) -> None:
    check(lambda x, weight: attend(*split(F.linear(x, weight))), *inputs()[:2], dynamic=True)
    assert targets(graphs[1])[APART] == 1


def test_with_a_mask_that_has_no_gradient(graphs: list[fx.Graph]) -> None:
    mask = randn(1, H, L, L, seed=3)
    check(lambda x, weight: attend(*split(F.linear(x, weight)), attn_mask=mask.to(x.dtype)), *inputs()[:2])
    assert targets(graphs[1])[PACKED] == 1


def other_order(qkv: Tensor) -> tuple[Tensor, ...]:
    k, q, v = split(qkv)
    return q, k, v


def by_head(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in qkv.view(B, L, H, 3 * D).chunk(3, dim=-1))


def heads_in_front(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.view(B, L, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)


def read_twice(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = split(qkv)
    return q, k, v + q


def added_to(qkv: Tensor) -> tuple[Tensor, ...]:
    """k's gradient is read once more, by the sum for what is added."""
    q, k, v = qkv.split(C, dim=-1)
    return heads_first(q, k + qkv.sum((0, 1))[:C], v)


def two_apart(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = split(qkv)
    return q, k, torch.ones_like(v)


def turned(qkv: Tensor) -> tuple[Tensor, ...]:
    """Lengths and heads as they are not: what is put together are rows of other elements."""
    return tuple(t.reshape(B, H, L, D) for t in qkv.split(C, dim=-1))


def wide_values(qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.split([C // 2, C // 2, 2 * C], dim=-1)
    return *heads_first(q, k), v.unflatten(-1, (-1, 4 * D)).transpose(1, 2)


@pytest.mark.parametrize(
    "heads",
    [other_order, by_head, heads_in_front, read_twice, added_to, two_apart, turned, wide_values],
    ids=lambda f: f.__name__,
)
def test_all_else_is_left_alone(graphs: list[fx.Graph], heads: Heads) -> None:
    check(lambda x, weight, bias: attend(*heads(F.linear(x, weight, bias))), *inputs())
    found = targets(graphs[1])
    assert (found[APART], found[PACKED]) == (1, 0)


def test_a_gradient_that_is_a_result_is_left_alone(graphs: list[fx.Graph]) -> None:
    check(lambda q, k, v: attend(q, k, v), *(randn(B, H, L, D, seed=seed) for seed in range(3)))
    assert targets(graphs[1])[APART] == 1


def test_a_mask_that_has_a_gradient_is_left_alone(graphs: list[fx.Graph]) -> None:
    mask = randn(1, H, L, L, seed=3)
    check(lambda x, weight, mask: attend(*split(F.linear(x, weight)), attn_mask=mask), *inputs()[:2], mask)
    assert targets(graphs[1])[APART] == 1


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_impls_that_are_asked_for(graphs: list[fx.Graph], name: str) -> None:
    options = {"burnish.impls": {name: "reference"}, "burnish.cache": "off"}
    check(lambda x, weight: attend(*split(F.linear(x, weight))), *inputs()[:2], options=options)
    assert packed(graphs[1]).kwargs["impl"] == "reference"


# --- by hand: what is put together otherwise ---


def traced(fn: Callable[..., Any], length: int) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph of `fn` of dq, dk and dv (B, H, length, D), and its inputs."""

    def run(*args: Tensor) -> Any:
        return fn(*torch.ops.burnish.attention_backward(*args)[:3])

    q, k, v, grad = (randn(B, H, length, D, seed=seed) for seed in range(4))
    args = grad, q, k, v, *attention_with_logsumexp(q, k, v)
    return make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args), args


def rewritten(fn: Callable[..., Any], length: int = H) -> fx.Graph:
    """That graph rewritten, which changes no bit of its results."""
    graph_module, args = traced(fn, length)
    before = graph_module(*args)
    pack_gradients(graph_module)
    graph_module.graph.lint()
    for found, expected in zip(*map(as_list, (graph_module(*args), before)), strict=True):
        assert torch.equal(found, expected)
    return graph_module.graph


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def rows_of(*gradients: Tensor) -> list[Tensor]:
    return [t.permute(0, 2, 1, 3).reshape(B, t.shape[2], -1) for t in gradients]


def cloned(*gradients: Tensor) -> Tensor:
    turned = (t.clone().permute(0, -2, 1, -1) for t in gradients)
    return torch.cat([t.clone(memory_format=torch.contiguous_format) for t in turned], -2)


def flat(*gradients: Tensor) -> Tensor:
    return torch.cat([t.permute(0, 2, 1, 3).reshape(-1, 32) for t in gradients], 1)


@pytest.mark.parametrize("fn", [lambda *g: torch.cat(rows_of(*g), 2), cloned, flat])
def test_by_hand(fn: Callable[..., Tensor]) -> None:
    found = targets(rewritten(fn, 9))
    assert (found[APART], found[PACKED]) == (0, 1)


def other_dims(*gradients: Tensor) -> Tensor:
    return torch.cat([t.permute(0, 3, 1, 2).reshape(B, 4, 32) for t in gradients], 2)


def not_turned(*gradients: Tensor) -> Tensor:
    return torch.cat(gradients, 2)


def viewed_first(*gradients: Tensor) -> Tensor:
    return torch.cat([t.reshape(B, 2, 8, 8).permute(0, 2, 1, 3).reshape(B, 4, 32) for t in gradients], 2)


def batch_with_length(*gradients: Tensor) -> Tensor:
    return torch.cat([t.reshape(1, -1, 32) for t in rows_of(*gradients)], 2)


def further_back(*gradients: Tensor) -> Tensor:
    return torch.cat([t.unflatten(2, (1, -1)) for t in rows_of(*gradients)], 3)


def along_lengths(*gradients: Tensor) -> Tensor:
    return torch.cat(rows_of(*gradients), 1)


def read_besides(*gradients: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat(rows_of(*gradients), 2), gradients[1].sum()


def rows_read_besides(*gradients: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows_of(*gradients)
    return torch.cat(rows, 2), rows[2].sum()


def a_fourth(*gradients: Tensor) -> Tensor:
    rows = rows_of(*gradients)
    return torch.cat([*rows, torch.ones_like(rows[0])], 2)


@pytest.mark.parametrize(
    "fn",
    [
        *(other_dims, not_turned, viewed_first, batch_with_length, further_back, along_lengths, read_besides),
        *(rows_read_besides, a_fourth),
    ],
)
def test_by_hand_all_else_is_left_alone(fn: Callable[..., Any]) -> None:
    found = targets(rewritten(fn))
    assert (found[APART], found[PACKED]) == (1, 0)


def test_gradients_that_are_taken_twice_are_left_alone() -> None:
    graph_module = traced(lambda *g: torch.cat(rows_of(*g), 2), 4)[0]
    (node,) = [n for n in graph_module.graph.nodes if str(n.target) == APART]
    (output,) = graph_module.graph.find_nodes(op="output")
    with graph_module.graph.inserting_before(output):
        again = graph_module.graph.call_function(operator.getitem, (node, 0))
    output.args = ((output.args[0], again),)
    pack_gradients(graph_module)
    assert targets(graph_module.graph)[PACKED] == 0
