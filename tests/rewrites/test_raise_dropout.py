"""Attention that drops weights: models in training mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.capture import Program, capture
from burnish.lower import op_of
from burnish.rewrites import FUSE, RAISE, apply, raise_attention
from burnish.verify import random_node, verify
from tests import zoo
from tests.zoo.hugging_face import bert, needs, text
from tests.zoo.plain import NanoBlock

from .conftest import Function, normal


@pytest.fixture(autouse=True)
def on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raise_attention, "_DROPPING", ("cuda", "cpu"))


def rewritten(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Program, list[tuple[Any, ...]]]:
    """The Program of a model as it is, verified, and the arguments of its attention calls."""
    program = capture(model, args, kwargs, attention_interface=False)
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        apply(name, rewrites, program.graph_module)
    leaves = pytree.tree_leaves((args, kwargs))
    checked = verify(program.graph_module, program.captured, leaves, lambda node: op_of(node.target).reference)  # type: ignore[union-attr]
    assert checked.skipped is None
    assert not checked.failures, [unit.verdict for unit in checked.failures]
    assert any("attention" in unit.ops for unit in checked.units)
    calls = [
        op.bind(*node.args, **node.kwargs)
        for node in program.graph_module.graph.nodes
        if (op := op_of(node.target)) is not None and op.name == "attention"
    ]
    return program, calls


def assert_drops(program: Program, calls: list[tuple[Any, ...]], dropout_p: float) -> None:
    """Each call has a seed of its own, drawn in the graph."""
    assert [call[8] for call in calls] == [dropout_p] * len(calls)
    assert len({call[9] for call in calls}) == len(calls)
    assert all(call[9].target is torch.ops.aten.randint_like.low_dtype for call in calls)
    assert random_node(program.graph_module.graph) is not None


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
    return F.dropout(weights, 0.25, training=True) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1) / 4.0).masked_fill(torch.ones(7, 7).tril() == 0, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.25) @ v


@pytest.mark.parametrize("function", [by_sdpa, written_out, masked])
def test_dropout_goes_into_the_op(function: Callable[..., Tensor]) -> None:
    q, k, v = (normal(2, 4, 7, 16, seed=seed) for seed in range(3))
    program, calls = rewritten(Function(function).train(), q, k, v)
    assert len(calls) == 1
    assert_drops(program, calls, 0.25)
    torch.manual_seed(0)
    first, second = (program.graph_module(q, k, v)[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(program.graph_module(q, k, v)[0], first)
    assert not torch.equal(first, second)
    ours = torch.stack([program.graph_module(q, k, v)[0] for _ in range(200)])
    theirs = torch.stack([function(q, k, v) for _ in range(200)])
    spread = theirs.std(dim=0).mean()
    assert (ours.mean(dim=0) - theirs.mean(dim=0)).abs().mean() < 0.15 * spread  # 0.08 of it is expected
    assert abs(ours.std(dim=0).mean() / spread - 1) < 0.1


@pytest.mark.parametrize("sdpa", [True, False], ids=["sdpa", "written out"])
def test_nanogpts_block(sdpa: bool) -> None:
    block = zoo.seeded(NanoBlock(32, 4, 16, True, sdpa, 0.2)).train()
    x = normal(2, 9, 32)
    program, calls = rewritten(block, x)
    assert_drops(program, calls, 0.2)
    assert [call[5] for call in calls] == [True]  # causal
    _, in_eval = rewritten(block.eval(), x)
    assert [call[8:] for call in in_eval] == [(0.0, None)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs("transformers"))])
def test_bert(attention: str, mark: None) -> None:
    model = bert(attention, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.3).train()
    program, calls = rewritten(model, **text()(2, 9, torch.float32))
    assert len(calls) == model.config.num_hidden_layers
    assert_drops(program, calls, 0.1)
    found = Counter(node.target for node in program.graph_module.graph.nodes)
    assert found[torch.ops.aten.dropout.default] > 0  # of hidden states: stays


def test_on_a_cpu_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = capture(Function(written_out).train(), tuple(normal(2, 4, 7, 16, seed=seed) for seed in range(3)))
    record = apply("raise", RAISE, program.graph_module)
    assert "no kernel has on cpu" in "\n".join(map(str, record.near_misses))
    assert torch.ops.aten.dropout.default in {node.target for node in program.graph_module.graph.nodes}
