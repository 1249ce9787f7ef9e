"""A product's heads that go into a cache: of one token on CUDA they are one Op; what stays, and why."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish import ops
from burnish.lower import Executable, op_of
from burnish.op import Op
from burnish.pack import pack
from burnish.rewrites import FUSE, RAISE, apply
from burnish.rewrites.rewrite import set_value
from burnish.verify import verify
from tests.rewrites.test_fuse_append import captured_step

aten = torch.ops.aten
SIZES = [4 * 8, 2 * 8, 2 * 8]


class Given:
    """The inputs of one layer's attention, in fake tensors on a device that need not be there."""

    def __init__(self, tokens: int = 1, device: str = "cuda") -> None:
        self.graph = fx.Graph()
        with FakeTensorMode():

            def given(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
                node = self.graph.placeholder(name)
                node.meta["val"] = torch.empty(shape, device=device, dtype=dtype)
                return node

            self.x, self.weight, self.bias = given("x", 2, tokens, 24), given("weight", 64, 24), given("bias", 64)
            self.residual = given("residual", 2, tokens, 64)
            self.tables = given("cos", tokens, 8), given("sin", tokens, 8)
            self.caches = given("k_cache", 2, 2, 100, 8), given("v_cache", 2, 2, 100, 8)
            self.lengths = given("lengths", dtype=torch.int64)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target.overload if isinstance(target, Op) else target, args)
        set_value(node)
        return node

    def product(self, *activation_and_residual: Any) -> fx.Node:
        return self.call(ops.linear, self.x, self.weight, self.bias, *activation_and_residual)

    def split(self, product: fx.Node, sizes: Sequence[int] = SIZES) -> list[fx.Node]:
        parts = self.call(aten.split_with_sizes.default, product, list(sizes), -1)
        return [self.call(operator.getitem, parts, i) for i in range(len(sizes))]

    def sliced(self, product: fx.Node) -> list[fx.Node]:
        ends = [(None, 32), (32, 48), (-16, 2**63 - 1)]
        return [self.call(aten.slice.Tensor, product, 2, start, stop) for start, stop in ends]

    def heads(self, part: fx.Node) -> fx.Node:
        b, s, n = part.meta["val"].shape
        return self.call(aten.transpose.int, self.call(aten.view.default, part, [b, s, n // 8, 8]), 1, 2)

    def appended(self, parts: Sequence[fx.Node], interleaved: bool = False) -> list[fx.Node]:
        heads = [self.heads(part) for part in parts]
        append = self.call(ops.rope_append, *heads, *self.tables, *self.caches, self.lengths, interleaved)
        return [self.call(operator.getitem, append, i) for i in range(3)]

    def appended_as_they_are(self, parts: Sequence[fx.Node]) -> list[fx.Node]:
        """Without rotation; q goes to the attention, whose result comes first."""
        q, k, v = (self.heads(part) for part in parts)
        append = self.call(ops.append_kv, *self.caches, k, v, self.lengths)
        caches = [self.call(operator.getitem, append, i) for i in range(2)]
        return [self.call(ops.cached_attention, q, *caches, self.lengths), *caches]

    def fused(self, *outputs: fx.Node) -> Any:
        self.graph.output(outputs)
        record = apply("fuse", FUSE, fx.GraphModule({}, self.graph))
        self.graph.lint()
        return record

    def ops(self) -> list[str]:
        return [op.name for node in self.graph.nodes if (op := op_of(node.target)) is not None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cut", [Given.split, Given.sliced])
def test_one_token_is_one_op(cut: Callable[..., list[fx.Node]], interleaved: bool) -> None:
    given = Given()
    record = given.fused(*given.appended(cut(given, given.product()), interleaved))
    assert record.matches == {"linear_rope_append": 1}
    node, *results, output = (node for node in given.graph.nodes if node.op != "placeholder")
    assert node.target is ops.linear_rope_append.overload
    inputs = given.x, given.weight, given.bias, *given.tables, *given.caches, given.lengths
    assert ops.linear_rope_append.bind(*node.args, **node.kwargs) == (*inputs, interleaved)
    assert [result.args for result in results] == [(node, 0), (node, 1), (node, 2)]
    assert output.args[0] == tuple(results)
    assert results[0].meta["val"].shape == node.meta["val"][0].shape == (2, 4, 1, 8)


@pytest.mark.parametrize("cut", [Given.split, Given.sliced])
def test_one_token_that_nothing_rotates_is_one_op(cut: Callable[..., list[fx.Node]]) -> None:
    given = Given()
    record = given.fused(*given.appended_as_they_are(cut(given, given.product())))
    assert record.matches == {"linear_rope_append": 1}
    node, *results, attention, output = (node for node in given.graph.nodes if node.op != "placeholder")
    assert node.target is ops.linear_rope_append.overload
    inputs = given.x, given.weight, given.bias, None, None, *given.caches, given.lengths
    assert ops.linear_rope_append.bind(*node.args, **node.kwargs) == (*inputs, False)
    of = {result.args[1]: result for result in results}
    assert all(result.args[0] is node for result in results)
    assert attention.args[:3] == (of[0], of[1], of[2])
    assert output.args[0] == (attention, of[1], of[2])


def test_parts_of_one_size() -> None:
    given = Given()
    parts = given.call(aten.split.Tensor, given.product(), 16, 2)
    q, k, v, _ = (given.call(operator.getitem, parts, i) for i in range(4))
    record = given.fused(*given.appended([q, k, v]))
    assert "q, k and v are not all columns" in "\n".join(map(str, record.near_misses))  # the last part is none of them


def _misses(record: Any) -> list[str]:
    """What this pass says, and the one that moves norms."""
    return [str(miss) for miss in record.near_misses if miss.rewrite in ("linear_rope_append", "norm prologue")]


def _plain(given: Given) -> list[fx.Node]:
    return given.appended(given.split(given.product()))


def _activated(given: Given) -> list[fx.Node]:
    return given.appended(given.split(given.product("relu")))


def _with_residual(given: Given) -> list[fx.Node]:
    return given.appended(given.split(given.product("none", given.residual)))


def _product_returned(given: Given) -> list[fx.Node]:
    product = given.product()
    return [*given.appended(given.split(product)), product]


def _part_read(given: Given) -> list[fx.Node]:
    parts = given.split(given.product())
    return [*given.appended(parts), given.call(aten.sin.default, parts[2])]


def _another_part(given: Given) -> list[fx.Node]:
    *parts, rest = given.split(given.product(), [16, 16, 16, 16])
    return [*given.appended(parts), given.call(aten.sin.default, rest)]


def _heads_read(given: Given) -> list[fx.Node]:
    results = given.appended(given.split(given.product()))
    append: Any = results[0].args[0]
    return [*results, given.call(aten.sin.default, append.args[0])]


def _keys_first(given: Given) -> list[fx.Node]:
    k, q, v = given.split(given.product(), [16, 32, 16])
    return given.appended([q, k, v])


def _queries_last(given: Given) -> list[fx.Node]:
    k, v, q = given.split(given.product(), [16, 16, 32])
    return given.appended([q, k, v])


def _of_two_products(given: Given) -> list[fx.Node]:
    q, k, _ = given.split(given.product())
    return given.appended([q, k, given.split(given.product())[2]])


def _normed_between(given: Given) -> list[fx.Node]:
    """As Qwen3 has it."""
    q, k, v = map(given.heads, given.split(given.product()))
    q, k = (given.call(ops.rms_norm, side, None, 1e-6) for side in (q, k))
    append = given.call(ops.rope_append, q, k, v, *given.tables, *given.caches, given.lengths, False)
    return [given.call(operator.getitem, append, i) for i in range(3)]


def _queries_read(given: Given) -> list[fx.Node]:
    attention, *caches = given.appended_as_they_are(given.split(given.product()))
    return [attention, *caches, given.call(aten.sin.default, attention.args[0])]


def _queries_scaled(given: Given) -> list[fx.Node]:
    q, k, v = given.split(given.product())
    return given.appended_as_they_are([given.call(aten.mul.Tensor, q, 2.0), k, v])


def _never_attended_to(given: Given) -> list[fx.Node]:
    return given.appended_as_they_are(given.split(given.product()))[1:]


def _as_they_are(given: Given) -> list[fx.Node]:
    return given.appended_as_they_are(given.split(given.product()))


@pytest.mark.parametrize(
    ("build", "tokens", "reason"),
    [
        (_plain, 2, "there are 2 new tokens; a product's kernel appends one"),
        (_as_they_are, 2, "there are 2 new tokens; a product's kernel appends one"),
        (_queries_read, 1, "q, k and v are not heads of three parts of one product"),
        (_queries_scaled, 1, "q, k and v are not heads of three parts of one product"),
        (_never_attended_to, 1, "not one attention reads what was appended"),
        (_activated, 1, "linear_default has an activation or adds a residual"),
        (_with_residual, 1, "linear_default has an activation or adds a residual"),
        (_product_returned, 1, "linear_default is not a product of which nothing but q, k and v is read"),
        (_part_read, 1, "q, k and v are not heads of three parts of one product"),
        (_another_part, 1, "linear_default is not a product of which nothing but q, k and v is read"),
        (_heads_read, 1, "q, k and v are not heads of three parts of one product"),
        (_keys_first, 1, "q, k and v are not all columns of linear_default, in this order"),
        (_queries_last, 1, "q, k and v are not all columns of linear_default, in this order"),
        (_of_two_products, 1, "q, k and v are not heads of three parts of one product"),
        (_normed_between, 1, "q, k and v are not heads of three parts of one product"),
    ],
)
def test_what_stays_says_why(build: Callable[[Given], list[fx.Node]], tokens: int, reason: str) -> None:
    given = Given(tokens)
    record = given.fused(*build(given))
    assert not record.matches
    assert "linear_rope_append" not in given.ops()
    (miss,) = _misses(record)
    rotated = build not in (_as_they_are, _queries_read, _queries_scaled, _never_attended_to)
    assert miss == f"linear_rope_append: {'rope_append' if rotated else 'append_kv'}_default: {reason}"


def test_on_another_device_nothing_is_said() -> None:
    given = Given(device="cpu")
    record = given.fused(*_plain(given))
    assert not record.matches
    assert not _misses(record)


def test_a_norm_before_it_stays() -> None:
    given = Given()
    given.x = given.call(ops.rms_norm, given.x, None, 1e-6)
    record = given.fused(*_plain(given))
    assert given.ops() == ["rms_norm", "linear_rope_append"]
    (miss,) = _misses(record)
    assert "rotates or appends heads in its epilogue, and has no norm in its prologue" in miss


@pytest.mark.parametrize(("family", "tokens"), [("llama", 1), ("llama", 2), ("gpt2", 1)])
def test_a_captured_step(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for CUDA, of a graph that runs here; Llama's q, k and v, three weights, are one in the end."""
    monkeypatch.setattr("burnish.rewrites.fuse.on_cuda", lambda node: True)
    program, model, leaves = captured_step(tokens, family)
    apply("raise", RAISE, program.graph_module)
    record = apply("fuse", FUSE, program.graph_module)
    assert record.matches.get("rope_append", 0) == (2 if family == "llama" else 0)
    assert record.matches.get("linear_rope_append", 0) == (2 if tokens == 1 else 0)
    packs, _ = pack(program.graph_module, model, lambda node: False)
    weights = [tuple(member.path.split(".")[-2] for member in packed.members) for packed in packs]
    assert weights.count(("q_proj", "k_proj", "v_proj")) == (2 if family == "llama" else 0)
    wanted = "linear_rope_append" if tokens == 1 else "rope_append"
    executable = Executable(program.graph_module, model)
    assert [slot.op.name for slot in executable.slots if slot.in_place] == [wanted] * 2
    caches = {i for i, leaf in enumerate(leaves) if leaf.dim() == 4}
    assert executable.donated == caches
    assert executable.borrowed >= caches
    checked = verify(program.graph_module, program.captured, leaves, lambda node: op_of(node.target).reference)  # type: ignore[union-attr]
    assert not checked.failures
    assert any(wanted in unit.ops for unit in checked.units)
