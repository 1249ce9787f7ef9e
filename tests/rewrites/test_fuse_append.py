"""A cache that is appended to: rotation goes along, what stays, and why."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish import ops
from burnish.capture import capture
from burnish.lower import Executable, op_of
from burnish.op import Op
from burnish.rewrites import FUSE, RAISE, apply
from burnish.rewrites.rewrite import set_value
from burnish.verify import verify

ADD = torch.ops.aten.add.Tensor


class Given:
    """The inputs of one layer's attention, in fake tensors on a device that need not be there."""

    def __init__(self, tokens: int = 1) -> None:
        self.graph = fx.Graph()
        new, cache = (2, 2, tokens, 64), (2, 2, 100, 64)
        with FakeTensorMode():

            def given(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
                node = self.graph.placeholder(name)
                node.meta["val"] = torch.empty(shape, device="cuda", dtype=dtype)
                return node

            self.q, self.k, self.v = given("q", 2, 8, *new[2:]), given("k", *new), given("v", *new)
            self.cos, self.sin = given("cos", tokens, 64), given("sin", tokens, 64)
            self.k_cache, self.v_cache = given("k_cache", *cache), given("v_cache", *cache)
            self.lengths = given("lengths", dtype=torch.int64)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target.overload if isinstance(target, Op) else target, args)
        set_value(node)
        return node

    def fused(self, *outputs: fx.Node) -> Any:
        self.graph.output(outputs)
        record = apply("fuse", FUSE, fx.GraphModule({}, self.graph))
        self.graph.lint()
        return record

    def ops(self) -> list[str]:
        return [op.name for node in self.graph.nodes if (op := op_of(node.target)) is not None]


def _attended(given: Given, q: Any, k: Any, v: Any, *, more: int = 1) -> fx.Node:
    return given.call(ops.cached_attention, q, k, v, given.call(ADD, given.lengths, more), None, None, None)


def _rotations(given: Given, **other: Any) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """The rotated q and k, and the caches with that k."""
    tables = given.cos, given.sin
    k = given.call(ops.rope, given.k, *tables, False)
    q = given.call(ops.rope, given.q, *other.get("tables", tables), other.get("interleaved", False))
    append = given.call(ops.append_kv, given.k_cache, given.v_cache, k, given.v, given.lengths)
    return q, k, [given.call(operator.getitem, append, i) for i in range(2)]


@pytest.mark.parametrize("tokens", [1, 3])
def test_rotations_go_into_the_cache(tokens: int) -> None:
    given = Given(tokens=tokens)
    q, _, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches, more=tokens), *caches)
    assert record.matches == {"rope_append": 1}
    assert given.ops() == ["rope_append", "cached_attention"]


def test_rotations_that_stay_say_why() -> None:
    given = Given()
    q, k, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches), k, *caches)
    assert "rope_default is read by more than the cache" in "\n".join(map(str, record.near_misses))
    given = Given()
    q, _, caches = _rotations(given, tables=(given.sin, given.cos))
    record = given.fused(_attended(given, q, *caches), *caches)
    assert "rotate by different tables" in "\n".join(map(str, record.near_misses))
    given = Given()
    q, _, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches), q, *caches)
    assert "is no rotation of which cached_attention_default is the only reader" in "\n".join(
        map(str, record.near_misses)
    )
    given = Given()
    _, _, caches = _rotations(given)
    record = given.fused(*caches)
    assert "not one attention reads what was appended" in "\n".join(map(str, record.near_misses))


# --- a captured model ----------------------------------------------------------------------------


def captured_step(tokens: int, family: str = "llama") -> Any:
    """A step of a small Llama or GPT-2, captured: (Program, model, flat inputs)."""
    transformers = pytest.importorskip("transformers")
    from torch.utils import _pytree as pytree

    from burnish.runtime.kv_cache import KVCache

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "llama":
        config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4)
        model = transformers.GPT2LMHeadModel(config).eval()
    cache, ids = KVCache.of(model, 2, 32), torch.randint(50, (2, 7))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.advance(7)
    mask = (torch.arange(32) >= torch.tensor([[0], [3]])).long()
    kwargs = {"input_ids": ids[:, :tokens], "past_key_values": cache, "attention_mask": mask}
    return capture(model, (), kwargs), model, pytree.tree_leaves(((), kwargs))


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_captured_step(tokens: int) -> None:
    program, model, leaves = captured_step(tokens)
    apply("raise", RAISE, program.graph_module)
    record = apply("fuse", FUSE, program.graph_module)
    assert record.matches["rope_append"] == 2
    executable = Executable(program.graph_module, model)
    writing = [slot for slot in executable.slots if slot.op.donates]
    assert [slot.op.name for slot in writing] == ["rope_append"] * 2
    assert all(slot.in_place for slot in writing)
    caches = {i for i, leaf in enumerate(leaves) if leaf.dim() == 4}
    assert executable.donated == caches
    assert executable.borrowed >= caches
    checked = verify(program.graph_module, program.captured, leaves, lambda node: op_of(node.target).reference)  # type: ignore[union-attr]
    assert not checked.failures
    assert any("rope_append" in unit.ops for unit in checked.units)
