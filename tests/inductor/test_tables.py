"""What `torch.compile(backend="burnish")` makes of the gradient of a table that is a product's weight as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.inductor import choices, tables
from burnish.inductor.tables import add_tables
from burnish.lower import op_of
from burnish.numerics import assert_close, randn
from burnish.ops import embedding_backward
from examples.gpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("untimed")
V, N, T = 40, 16, 24
BF16 = torch.bfloat16
IDS = torch.randint(V, (T,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(tables, "_DEVICES", ("cpu",))


def sums_of(graph: fx.Graph) -> list[tuple[int, str | None, str | None]]:
    """Of each table's gradient the entries, and the names of what is added and of its factor."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and op_of(node.target) is embedding_backward:
            _, _, entries, *tied = embedding_backward.bind(*node.args)
            found.append((entries, *(t.name if t is not None else None for t in tied)))
    return found


@pytest.mark.parametrize(
    "kind", ["autocast", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float32"))]
)
def test_a_gpt_with_tied_weights(graphs: list[fx.Graph], kind: str) -> None:
    torch.manual_seed(0)
    dtype = BF16 if kind == "bfloat16" else torch.float32
    model = GPT(GPTConfig(num_layers=1, num_heads=2, width=32, context=16, vocab_size=V)).to(dtype)
    ids = torch.randint(V, (2, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for run, to in ((torch.compile(model, backend="burnish"), dtype), (model, dtype), (model, torch.float64)):
        model.to(to).zero_grad(set_to_none=True)
        with torch.autocast("cpu", BF16, enabled=kind == "autocast" and to != torch.float64):
            loss = run(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        (loss * 8).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(*found)
    assert sums_of(graphs[-1]) == [(16, None, None), (V, "getitem_13", "tangents_1")]


def rewritten(fn: Callable[..., object], *inputs: Tensor) -> fx.Graph:
    graph_module = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    add_tables(graph_module)
    graph_module.graph.lint()
    double = (t.double() if t.is_floating_point() else t for t in inputs)
    assert_close(graph_module(*inputs), fn(*inputs), fn(*double))
    return graph_module.graph


def looked_up(grad: Tensor, ids: Tensor) -> Tensor:
    return embedding_backward(grad, ids, V)


GRAD, PRODUCT = randn(T, N, seed=0), randn(V, N, seed=1)
SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[str | None, str | None] | None]] = {
    "plain": (lambda g, i, d: d + looked_up(g, i), (GRAD, IDS, PRODUCT), ("d_1", None)),
    "the other way round": (lambda g, i, d: looked_up(g, i) + d, (GRAD, IDS, PRODUCT), ("d_1", None)),
    "scaled": (
        lambda g, i, d, s: (s * d) + looked_up(g, i),
        (GRAD, IDS, PRODUCT, torch.tensor(0.3)),
        ("d_1", "s_1"),
    ),
    "a vector's multiple": (
        lambda g, i, d, s: (d * s) + looked_up(g, i),
        (GRAD, IDS, PRODUCT, randn(N, seed=3)),
        ("mul", None),
    ),
    "a constant's multiple": (lambda g, i, d: (d * 0.5) + looked_up(g, i), (GRAD, IDS, PRODUCT), ("mul", None)),
    "widened": (lambda g, i, d: d.to(g.dtype) + looked_up(g, i), (GRAD, IDS, PRODUCT.bfloat16()), ("d_1", None)),
    "a factor of the sum": (lambda g, i, d: torch.add(d, looked_up(g, i), alpha=2), (GRAD, IDS, PRODUCT), None),
    "a row for all": (lambda g, i, d: d + looked_up(g, i), (GRAD, IDS, PRODUCT[:1]), None),
    "a number": (lambda g, i, d: d + looked_up(g, i), (GRAD, IDS, torch.tensor(1.0)), None),
    "an integer": (lambda g, i, d: looked_up(g, i) + 1, (GRAD, IDS, PRODUCT), None),
    "integers": (lambda g, i, d: looked_up(g, i) + d, (GRAD, IDS, torch.ones(V, N, dtype=torch.long)), None),
    "a sum with itself": (lambda g, i, d: (lambda t: t + t)(looked_up(g, i)), (GRAD, IDS, PRODUCT), None),
    "a wider sum": (lambda g, i, d: d + looked_up(g, i), (GRAD.bfloat16(), IDS, PRODUCT), None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    fn, inputs, expected = SPELLINGS[name]
    graph = rewritten(fn, *inputs)
    assert sums_of(graph) == [(V, *(expected or (None, None)))]
    adds = [node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert bool(adds) == (expected is None)


def test_a_gradient_that_is_used_elsewhere_stays() -> None:
    def fn(grad: Tensor, ids: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        table = looked_up(grad, ids)
        return table + product, table * 2

    assert sums_of(rewritten(fn, GRAD, IDS, PRODUCT)) == [(V, None, None)]


def test_a_sum_that_is_used_elsewhere_is_made_once() -> None:
    def fn(grad: Tensor, ids: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        table = looked_up(grad, ids) + product
        return table, table * 2

    assert sums_of(rewritten(fn, GRAD, IDS, PRODUCT)) == [(V, "product_1", None)]


def test_a_table_that_is_looked_up_twice() -> None:
    def fn(grad: Tensor, other: Tensor, ids: Tensor, product: Tensor, scale: Tensor) -> Tensor:
        return product * scale + looked_up(grad, ids) + looked_up(other, ids.flip(0))

    graph = rewritten(fn, GRAD, randn(T, N, seed=4), IDS, PRODUCT, torch.tensor(2.0))
    assert sums_of(graph) == [(V, "product_1", "scale_1"), (V, "embedding_backward_default", None)]


def test_other_devices_are_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_DEVICES", ("cuda",))
    assert sums_of(rewritten(lambda g, i, d: d + looked_up(g, i), GRAD, IDS, PRODUCT)) == [(V, None, None)]


def test_padding_is_left_out_before_the_sum(graphs: list[fx.Graph]) -> None:
    """Not by another pass over the table, behind which the sum would not be found."""
    table = nn.Embedding(V, N, padding_idx=int(IDS[0]))

    def fn(weight: Tensor) -> Tensor:
        return F.linear(F.embedding(IDS, weight, table.padding_idx), weight).sin().sum()

    found = []
    for run, dtype in ((torch.compile(fn, backend="burnish"), torch.float32), (fn, torch.float32), (fn, torch.float64)):
        weight = table.weight.detach().to(dtype).requires_grad_()
        found.append(torch.autograd.grad(run(weight), weight))
    assert_close(*found)
    ((entries, added, scale),) = sums_of(graphs[-1])
    assert (entries, added is None, scale) == (V, False, None)


def test_kernels_are_timed_on_ids_as_in_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one id for all the time would be that of one row's sum."""
    args = choices._like(embedding_backward, (torch.empty(4096, 8), torch.zeros(4096).long(), 5000, None, None))
    assert args is not None
    counts = args[1].bincount()
    assert len(counts) <= 5000
    assert args[1].min() >= 0
    assert 200 < counts.max() < 600
    assert 800 < counts.count_nonzero() < 2500
    expanded = torch.zeros(1, dtype=torch.long).expand(7)
    args = choices._like(embedding_backward, (torch.empty(7, 8), expanded, 5000, None, None))
    assert args is not None
    assert args[1].stride() == (0,)
