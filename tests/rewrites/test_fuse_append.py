"""A cache that is appended to: rotation goes along, and for one token on CUDA attention too; what stays, and why."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish import ops
from burnish.capture import capture
from burnish.lower import Executable, op_of
from burnish.op import Op
from burnish.rewrites import APPEND_ATTENTION, FUSE, RAISE, apply
from burnish.rewrites.rewrite import set_value
from burnish.verify import verify

Call = Callable[..., Any]
FUSE_APPEND = [*(each for each in FUSE if each.name != "linear_rope_append"), APPEND_ATTENTION]
ADD = torch.ops.aten.add.Tensor


class Given:
    """The inputs of one layer's attention, in fake tensors on a device that need not be there."""

    def __init__(self, heads: int = 8, tokens: int = 1, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
        self.graph = fx.Graph()
        new, cache = (2, 2, tokens, width), (2, 2, 100, width)
        with FakeTensorMode():

            def given(name: str, *shape: int, dtype: torch.dtype = dtype) -> fx.Node:
                node = self.graph.placeholder(name)
                node.meta["val"] = torch.empty(shape, device="cuda", dtype=dtype)
                return node

            self.q, self.k, self.v = given("q", 2, heads, *new[2:]), given("k", *new), given("v", *new)
            self.cos, self.sin = given("cos", tokens, width), given("sin", tokens, width)
            self.k_cache, self.v_cache = given("k_cache", *cache), given("v_cache", *cache)
            self.lengths = given("lengths", dtype=torch.int64)
            self.padding = given("padding", 2, 100, dtype=torch.bool)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target.overload if isinstance(target, Op) else target, args)
        set_value(node)
        return node

    def appended(self, interleaved: bool = False) -> list[fx.Node]:
        args = self.q, self.k, self.v, self.cos, self.sin, self.k_cache, self.v_cache, self.lengths, interleaved
        append = self.call(ops.rope_append, *args)
        return [self.call(operator.getitem, append, i) for i in range(3)]

    def fused(self, *outputs: fx.Node) -> Any:
        self.graph.output(outputs)
        record = apply("fuse", FUSE_APPEND, fx.GraphModule({}, self.graph))
        self.graph.lint()
        return record

    def ops(self) -> list[str]:
        return [op.name for node in self.graph.nodes if (op := op_of(node.target)) is not None]


@pytest.mark.parametrize("interleaved", [False, True])
def test_one_token_is_one_op(interleaved: bool) -> None:
    given = Given()
    q, k, v = given.appended(interleaved)
    total = given.call(ADD, given.lengths, 1)
    attended = given.call(ops.cached_attention, q, k, v, total, given.padding, 9, 0.5)
    record = given.fused(given.call(torch.ops.aten.sin.default, attended), k, v)
    assert record.matches == {"rope_append_attention": 1}
    assert given.ops() == ["rope_append_attention"]
    (node,) = (node for node in given.graph.nodes if op_of(node.target) is not None)
    inputs = given.q, given.k, given.v, given.cos, given.sin, given.k_cache, given.v_cache, given.lengths
    bound = ops.rope_append_attention.bind(*node.args, **node.kwargs)
    assert bound == (*inputs, given.padding, 9, 0.5, interleaved)
    outputs: Any = given.graph.output_node().args[0]
    sine, *caches = outputs
    assert [cache.args for cache in (sine.args[0], *caches)] == [(node, 0), (node, 1), (node, 2)]
    assert caches[0].meta["val"].shape == (2, 2, 100, 64)
    assert not [node for node in given.graph.nodes if node.target is ADD]


def test_layers_that_share_a_sum_and_a_mask_that_comes_late() -> None:
    given = Given()
    q, k, v = given.appended()
    total = given.call(ADD, given.lengths, 1)
    mask = given.call(torch.ops.aten.logical_not.default, given.padding)
    first = given.call(ops.cached_attention, q, k, v, total, mask, None, None)
    given.q = given.call(torch.ops.aten.neg.default, first)
    others = given.appended()
    second = given.call(ops.cached_attention, *others, total, mask, None, None)
    record = given.fused(second, k, v, *others[1:])
    assert record.matches == {"rope_append_attention": 2}
    assert given.ops() == ["rope_append_attention"] * 2


def _attended(given: Given, q: Any, k: Any, v: Any, *, more: int = 1) -> fx.Node:
    return given.call(ops.cached_attention, q, k, v, given.call(ADD, given.lengths, more), None, None, None)


def _two_attentions(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, k, v), _attended(given, q, k, v), k, v]


def _another_reader(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, k, v), given.call(torch.ops.aten.sin.default, k), v]


def _query_returned(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, k, v), q, k, v]


def _without_its_own(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [given.call(ops.cached_attention, q, k, v, given.lengths, None, None, None), k, v]


def _two_more(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, k, v, more=2), k, v]


def _exchanged(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, v, k), k, v]


def _plain(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [_attended(given, q, k, v), k, v]


def _not_attention(given: Given) -> list[fx.Node]:
    q, k, v = given.appended()
    return [given.call(ops.attention, q, k, v), k, v]


@pytest.mark.parametrize(
    ("build", "sizes", "reason"),
    [
        (_two_attentions, {}, "not by one attention alone"),
        (_another_reader, {}, "not by one attention alone"),
        (_query_returned, {}, "is not the attention to the cache, or not all that reads the rotated query"),
        (_without_its_own, {}, "attends to something else than what is filled now"),
        (_two_more, {}, "attends to something else than what is filled now"),
        (_exchanged, {}, "attends to something else than what is filled now"),
        (_not_attention, {}, "attention_default is not the attention to the cache"),
        (_plain, {"tokens": 2}, "there are 2 new tokens; one kernel does all of it for one"),
        (_plain, {"heads": 130}, "65 heads of 64 share a key head; the kernel takes 64 of 256"),
        (_plain, {"width": 264}, "4 heads of 264 share a key head"),
        (_plain, {"dtype": torch.float64}, "it is of torch.float64; the kernel takes"),
    ],
)
def test_what_stays_says_why(build: Callable[[Given], list[fx.Node]], sizes: dict[str, Any], reason: str) -> None:
    given = Given(**sizes)
    outputs = build(given)
    before = list(given.graph.nodes)
    record = given.fused(*outputs)
    assert not record.matches
    assert list(given.graph.nodes)[:-1] == before
    (miss,) = record.near_misses
    assert miss.startswith("rope_append_attention: rope_append_default: ")
    assert reason in miss


# --- rotation and the cache, on any device -------------------------------------------------------


def _rotations(given: Given, **other: Any) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """The rotated q and k, and the caches with that k."""
    tables = given.cos, given.sin
    k = given.call(ops.rope, given.k, *tables, False)
    q = given.call(ops.rope, given.q, *other.get("tables", tables), other.get("interleaved", False))
    append = given.call(ops.append_kv, given.k_cache, given.v_cache, k, given.v, given.lengths)
    return q, k, [given.call(operator.getitem, append, i) for i in range(2)]


def test_rotations_go_into_the_cache_with_several_tokens() -> None:
    given = Given(tokens=3)
    q, _, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches, more=3), *caches)
    assert record.matches == {"rope_append": 1}
    assert given.ops() == ["rope_append", "cached_attention"]
    assert any("there are 3 new tokens" in miss for miss in record.near_misses)


def test_rotations_and_attention_of_one_token_in_one_go() -> None:
    given = Given()
    q, _, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches), *caches)
    assert record.matches == {"rope_append": 1, "rope_append_attention": 1}
    assert given.ops() == ["rope_append_attention"]


def test_rotations_that_stay_say_why() -> None:
    given = Given()
    q, k, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches), k, *caches)
    assert "rope_default is read by more than the cache" in "\n".join(record.near_misses)
    given = Given()
    q, _, caches = _rotations(given, tables=(given.sin, given.cos))
    record = given.fused(_attended(given, q, *caches), *caches)
    assert "rotate by different tables" in "\n".join(record.near_misses)
    given = Given()
    q, _, caches = _rotations(given)
    record = given.fused(_attended(given, q, *caches), q, *caches)
    assert "is no rotation of which cached_attention_default is the only reader" in "\n".join(record.near_misses)
    given = Given()
    _, _, caches = _rotations(given)
    record = given.fused(*caches)
    assert "not one attention reads what was appended" in "\n".join(record.near_misses)


# --- a captured Llama ----------------------------------------------------------------------------


def _step(tokens: int) -> Any:
    """A step of a small Llama, captured: (Program, model, flat inputs)."""
    transformers = pytest.importorskip("transformers")
    from torch.utils import _pytree as pytree

    from burnish.runtime.kv_cache import KVCache

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    cache, ids = KVCache.of(model, 2, 32), torch.randint(50, (2, 7))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.advance(7)
    mask = (torch.arange(32) >= torch.tensor([[0], [3]])).long()
    kwargs = {"input_ids": ids[:, :tokens], "past_key_values": cache, "attention_mask": mask}
    return capture(model, (), kwargs), model, pytree.tree_leaves(((), kwargs))


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_captured_step(tokens: int, on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_cuda:  # rewrites as for CUDA, of a graph that runs here
        monkeypatch.setattr("burnish.rewrites.fuse.on_cuda", lambda node: True)
    program, model, leaves = _step(tokens)
    apply("raise", RAISE, program.graph_module)
    record = apply("fuse", FUSE_APPEND, program.graph_module)
    assert record.matches["rope_append"] == 2
    assert record.matches.get("rope_append_attention", 0) == (2 if on_cuda and tokens == 1 else 0)
    executable = Executable(program.graph_module, model)
    writing = [slot for slot in executable.slots if slot.op.donates]
    wanted = "rope_append_attention" if on_cuda and tokens == 1 else "rope_append"
    assert [slot.op.name for slot in writing] == [wanted] * 2
    assert all(slot.in_place for slot in writing)
    caches = {i for i, leaf in enumerate(leaves) if leaf.dim() == 4}
    assert executable.donated == caches
    assert executable.borrowed >= caches
    checked = verify(program.graph_module, program.captured, leaves, lambda node: op_of(node.target).reference)  # type: ignore[union-attr]
    assert not checked.failures
    assert any(wanted in unit.ops for unit in checked.units)
