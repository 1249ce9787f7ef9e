"""Verification: what is compared with what, what it finds, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from burnish import verify as module
from burnish.capture import Program, capture
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import Verification, check_outputs, outputs_in_float64, random_node, restore, units_of, verify
from tests import zoo
from tests.e2e import float64

aten = torch.ops.aten
WIDTH = 32
X = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention and an MLP around residual sums; the second norm is fused with its sum."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


OPS = Counter(layer_norm=1, add_layer_norm=1, linear=3, attention=1)


def rewritten(model: nn.Module, *inputs: Tensor) -> Program:
    program = capture(model, inputs or (X,))
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        apply(name, rewrites, program.graph_module)
    return program


def ops_in(program: Program) -> Counter[str]:
    return Counter(op.name for node in program.graph_module.graph.nodes if (op := op_of(node.target)) is not None)


def reference(node: fx.Node) -> Callable[..., Any]:
    op = op_of(node.target)
    assert op is not None
    return op.reference


def verified(program: Program, function_of: Callable[[fx.Node], Callable[..., Any]] = reference) -> Verification:
    return verify(program.graph_module, program.captured, [X], function_of)


@pytest.fixture
def model() -> nn.Module:
    return zoo.seeded(Block())


@pytest.fixture
def program(model: nn.Module) -> Program:
    return rewritten(model)


# --- units ---


def test_every_op_is_in_a_unit_and_every_unit_is_one_value(program: Program) -> None:
    assert ops_in(program) == OPS
    units = units_of(program.graph_module.graph, program.captured.graph)
    inner = {node for unit in units for node in unit.inner}
    assert {node for node in program.graph_module.graph.nodes if op_of(node.target) is not None} <= inner
    # The fused sum and norm have two results, each a unit of its own; the gelu and its product are one value.
    assert Counter(op for unit in units for op in unit.ops) == OPS + Counter(add_layer_norm=1)
    assert [unit.origin.name for unit in units] == [unit.node.meta["origin"] for unit in units]
    assert "gelu" in [unit.origin.name for unit in units]


def test_right_rewrites_pass(program: Program) -> None:
    verification = verified(program)
    assert verification.skipped is None
    assert verification.failures == []
    assert all(unit.verdict is not None and unit.verdict.ok for unit in verification.units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [lambda out: out * 1.02, lambda out: out.fill_(torch.nan), lambda out: out[:1]])
def test_a_wrong_impl_is_found_and_no_other(wrong: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Each unit runs on eager's own inputs, so that an error stays where it arises."""
    program = rewritten(zoo.seeded(Block()).to(dtype), X.to(dtype))

    def function_of(node: fx.Node) -> Callable[..., Any]:
        right = reference(node)
        return (lambda *args: wrong(right(*args))) if op_of(node.target).name == "attention" else right  # type: ignore[union-attr]

    verification = verify(program.graph_module, program.captured, [X.to(dtype)], function_of)
    (failure,) = verification.failures
    assert failure.ops == ["attention"]
    assert failure.verdict is not None
    assert failure.verdict.reason


def spoil(program: Program) -> None:
    """The first norm gets another eps: a wrong rewrite."""
    (norm,) = (n for n in program.graph_module.graph.nodes if n.name.startswith("layer_norm"))
    norm.args = (*norm.args[:3], 1.0)


def test_a_wrong_rewrite_is_found_and_undone(program: Program, model: nn.Module) -> None:
    spoil(program)
    (failure,) = verified(program).failures
    assert failure.ops == ["layer_norm"]
    restore(program.graph_module, program.captured, failure)
    program.graph_module.graph.lint()
    assert ops_in(program) == OPS - Counter(layer_norm=1)
    assert aten.layer_norm.default in {node.target for node in program.graph_module.graph.nodes}
    assert verified(program).failures == []
    with torch.no_grad():
        (result,) = program.graph_module(X)
        assert_close(result, model(X), float64.outputs_in_float64(model, (X,))[0])


def test_every_unit_can_be_undone(program: Program, model: nn.Module) -> None:
    units = units_of(program.graph_module.graph, program.captured.graph)
    while units:
        restore(program.graph_module, program.captured, units[-1])
        program.graph_module.graph.lint()
        units = units_of(program.graph_module.graph, program.captured.graph)
    assert not ops_in(program)
    with torch.no_grad():
        assert torch.equal(program.graph_module(X)[0], program.captured(X)[0])


def test_active_dropout_is_switched_off_to_verify_what_is_around_it() -> None:
    program = rewritten(zoo.seeded(Block(dropout=0.5)).train())
    assert random_node(program.captured.graph) == "dropout"
    before = torch.get_rng_state()
    verification = verified(program)
    assert torch.equal(torch.get_rng_state(), before)
    assert verification.skipped is None
    assert verification.units
    assert not verification.failures
    spoil(program)
    (failure,) = verified(program).failures
    assert failure.ops == ["layer_norm"]


def test_what_is_random_but_not_for_dropout_cannot_be_verified() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x * torch.bernoulli(x.sigmoid()), x.shape[-1:])

    verification = verified(rewritten(Noisy()))
    assert (verification.skipped, verification.units) == ("bernoulli is random", [])


@pytest.mark.parametrize(
    ("target", "args", "name"),
    [
        (aten.dropout.default, (0.5, True), "dropout_default"),
        (aten.dropout.default, (0.5, False), None),
        (aten.dropout.default, (0.0, True), None),
        (aten.rand_like.default, (), "rand_like_default"),
        (aten.relu.default, (), None),
    ],
)
def test_what_is_random(target: Any, args: tuple[Any, ...], name: str | None) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"), *args)))
    assert random_node(graph) == name


# --- the oracle ---


class Casts(nn.Module):
    """What a float64 run has to look after: a table, a large product, and casts that name a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 40)
        self.register_buffer("scale", torch.rand(WIDTH))
        self.scale: Tensor

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.table(ids) * self.scale + x.to(torch.bfloat16)
        hidden = torch.softmax(hidden, -1, dtype=torch.float32).type_as(x) + torch.ones(WIDTH, dtype=torch.float32)
        return self.head(hidden), F.linear(hidden, self.head.weight), ids + 1


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_outputs_in_float64_are_the_models(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model, ids = zoo.seeded(Casts()), torch.randint(20, (2, 6))
    outputs = outputs_in_float64(capture(model, (ids, X)).captured, [ids, X])
    assert [out.dtype for out in outputs] == [torch.float64, torch.float64, torch.int64]
    with torch.no_grad():
        eager = model(ids, X)
    for out, true, single in zip(outputs, float64.outputs_in_float64(model, (ids, X)), eager, strict=True):
        assert (out - true).abs().max() <= 1e-6 * (single - true).abs().max(), "a rounding to anything less shows"


def test_outputs_are_judged_by_the_rule() -> None:
    with torch.no_grad():
        eager, true = torch.softmax(X, -1), torch.softmax(X.double(), -1)
    assert check_outputs([eager, None, 3], [eager, None, 3], [true, None, 3]).ok
    assert not check_outputs([eager, eager * 1.01], [eager, eager], [true, true]).ok
    assert check_outputs([None], [None], [None]).ok
