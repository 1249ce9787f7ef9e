"""Ops fused to wider ones: gated MLPs, sums before norms, embeddings, products of one input."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish import ops
from burnish.op import Op
from burnish.rewrites import FUSE, apply
from burnish.rewrites.rewrite import set_value
from tests.zoo.plain import GatedMLP

from .conftest import normal

aten = torch.ops.aten
WIDTH = 24
X, SQUARE = normal(2, 5, WIDTH), normal(WIDTH, WIDTH)


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)), with the two factors in either order."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], biases: tuple[bool, bool] = (False, False), up_first: bool = False
    ) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 40, bias=bias) for bias in biases)
        self.down = nn.Linear(40, WIDTH)
        self.act, self.up_first = act, up_first

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.act(self.gate(x)), self.up(x)
        return self.down(up * gate if self.up_first else gate * up)


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(activation: str, bias: bool, up_first: bool, rewrite: Callable[..., Any]) -> None:
    act = GatedMLP(8, 8, activation, bias=False).act
    found = rewrite(Gated(act, (bias, bias), up_first), normal(2, 5, WIDTH))
    assert found.ops == Counter(gated_mlp=1)
    assert found.calls[0][5] == activation
    x, gate_up, *_ = found.calls[0]
    assert [part.target for part in gate_up.args[0]] == ["gate.weight", "up.weight"]
    assert x.op == "placeholder"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Gated(F.relu), "the gate's activation is relu"),
        (Gated(F.silu, (True, False)), "only one of gate and up has a bias"),
    ],
    ids=["relu", "one bias"],
)
def test_gated_mlp_that_stays(model: nn.Module, reason: str, rewrite: Callable[..., Any]) -> None:
    found = rewrite(model, normal(2, 5, WIDTH))
    assert found.ops["gated_mlp"] == 0
    assert reason in found.reasons


def test_a_gate_without_activation_is_no_gated_mlp(rewrite: Callable[..., Any]) -> None:
    found = rewrite(Gated(lambda x: x), normal(2, 5, WIDTH))
    assert found.ops["gated_mlp"] == 0


def test_a_gated_product_that_others_need_stays(rewrite: Callable[..., Any]) -> None:
    class Shown(Gated):
        def forward(self, x: Tensor) -> Any:
            hidden = self.act(self.gate(x)) * self.up(x)
            return self.down(hidden), hidden

    assert rewrite(Shown(F.silu), normal(2, 5, WIDTH)).ops == Counter(linear=3)


# --- sums and norms ---


class Summed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.norm(total), total


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_sum_and_its_norm_give_both(name: str, rewrite: Callable[..., Any]) -> None:
    norm = {"layer_norm": nn.LayerNorm(WIDTH), "rms_norm": nn.RMSNorm(WIDTH, eps=1e-5)}[name]
    found = rewrite(Summed(norm), normal(2, 5, WIDTH), normal(2, 5, WIDTH, seed=1))
    assert found.ops == Counter({f"add_{name}": 1})
    assert aten.add.Tensor not in found.targets


class PostNorm(Summed):
    """As in BERT: nobody reads the sum."""

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        return self.norm(x + residual) * 2


class PreNorm(Summed):
    """As in Llama: the sum goes on to the next residual connection."""

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        total = x + residual
        return total + torch.sin(self.norm(total))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("cls", [PostNorm, PreNorm, Summed])
def test_a_sum_is_kept_where_it_is_read(cls: type[Summed], name: str, rewrite: Callable[..., Any]) -> None:
    norm = {"layer_norm": nn.LayerNorm(WIDTH), "rms_norm": nn.RMSNorm(WIDTH, eps=1e-5)}[name]
    found = rewrite(cls(norm), normal(2, 5, WIDTH), normal(2, 5, WIDTH, seed=1))
    assert found.ops == Counter({f"add_{name}": 1})
    kept = cls is not PostNorm
    assert found.calls[0][-1] is kept
    assert found.fused.matches.get("unread sums", 0) == (not kept)
    (node,) = (node for node in found.graph.nodes if isinstance(node.meta.get("val"), tuple))
    normed, total = node.meta["val"]
    assert total.shape == (normed.shape if kept else (0,))
    assert sorted(user.args[1] for user in node.users) == ([0, 1] if kept else [0])
    assert len(found.verification.units) == 1 + kept


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ops.add_layer_norm, (X, X)),
        (ops.add_rms_norm, (X, X)),
        (ops.linear_add_layer_norm, (X, SQUARE, SQUARE[0], X)),
        (ops.linear_add_rms_norm, (X, SQUARE, SQUARE[0], X)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_unread_sum_of_an_op_that_the_model_calls(
    op: Op, args: tuple[Tensor, ...], rewrite: Callable[..., Any]
) -> None:
    for read, kept in ((0, False), (1, True), (-1, True)):
        found = rewrite(lambda *given, read=read: op(*given)[read].sin(), *args)
        assert found.ops == Counter({op.name: 1})
        assert found.calls[0][-1] is kept


@pytest.mark.parametrize("kept", [False, True])
def test_a_product_its_sum_and_its_norm_on_cuda(kept: bool) -> None:
    """In fake tensors, which need no such device."""
    graph = fx.Graph()
    x, weight, residual = (graph.placeholder(name) for name in ("x", "weight", "residual"))
    with FakeTensorMode():
        for node, like in ((x, X), (weight, SQUARE), (residual, X)):
            node.meta["val"] = torch.empty(like.shape, device="cuda")

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        set_value(node)
        return node

    total = call(aten.add.Tensor, call(ops.linear.overload, x, weight, None, "none", None), residual)
    normed = call(ops.layer_norm.overload, total, None, None, 1e-5)
    graph.output((normed, total) if kept else (normed,))
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    assert record.matches == {"add_layer_norm": 1, "linear_add_norm": 1, **({} if kept else {"unread sums": 1})}
    (node,) = (node for node in graph.nodes if node.target is ops.linear_add_layer_norm.overload)
    assert node.args == (x, weight, None, residual, None, None, 1e-5, kept)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_broadcast_sum_stays(name: str, rewrite: Callable[..., Any]) -> None:
    norm = {"layer_norm": nn.LayerNorm(WIDTH), "rms_norm": nn.RMSNorm(WIDTH, eps=1e-5)}[name]
    found = rewrite(Summed(norm), normal(2, 5, WIDTH), normal(5, WIDTH))
    assert found.ops == Counter({name: 1})
    assert "the summands have shapes" in found.reasons


def test_a_sum_with_a_number_stays(rewrite: Callable[..., Any]) -> None:
    norm = nn.LayerNorm(WIDTH)
    found = rewrite(nn.Sequential(Plus(1.0), norm), normal(2, 5, WIDTH))
    assert found.ops == Counter(layer_norm=1)


class Plus(nn.Module):
    def __init__(self, other: float) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other


def test_a_scaled_sum_stays(rewrite: Callable[..., Any]) -> None:
    class Scaled(Summed):
        def forward(self, x: Tensor, residual: Tensor) -> Any:
            return self.norm(torch.add(x, residual, alpha=0.5))

    found = rewrite(Scaled(nn.LayerNorm(WIDTH)), normal(2, 5, WIDTH), normal(2, 5, WIDTH, seed=1))
    assert found.ops == Counter(layer_norm=1)


class Embeddings(nn.Module):
    """BERT's: word + type, then + position, then the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(31, WIDTH, padding_idx=0)
        self.position, self.kind = nn.Embedding(16, WIDTH), nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        return self.norm(self.word(ids) + self.kind(types) + self.position(positions))


def test_embeddings_and_their_norm(rewrite: Callable[..., Any]) -> None:
    ids = torch.arange(10).view(2, 5)
    found = rewrite(Embeddings(), ids, ids.remainder(5), ids.remainder(2))
    assert found.ops == Counter(embedding_layer_norm=1)
    assert [node.target for node in found.calls[0][1:7:2]] == ["word.weight", "position.weight", "kind.weight"]


# --- products of one input ---


class Projections(nn.Module):
    def __init__(self, biases: tuple[bool, ...] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=b) for size, b in zip((24, 8, 8), biases, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(
    "biases", [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
)
def test_products_of_one_input_become_one(biases: tuple[bool, ...], rewrite: Callable[..., Any]) -> None:
    found = rewrite(Projections(biases), normal(2, 5, WIDTH))
    assert found.ops == Counter(linear=1)
    _, weight, bias, *_ = found.calls[0]
    assert weight.meta["val"].shape == (40, WIDTH)
    assert (bias is not None) == any(biases)
    assert len(found.verification.units) == 3


def test_products_of_different_modules_stay_apart(rewrite: Callable[..., Any]) -> None:
    """As a decoder's cross attentions, which all project the encoder's output."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Projections(), Projections()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (*self.first(x), *self.second(x))

    assert rewrite(Layers(), normal(2, 5, WIDTH)).ops == Counter(linear=2)


def test_products_of_different_inputs_stay_apart(rewrite: Callable[..., Any]) -> None:
    class Other(Projections):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.q(x), self.k(x.sin()), self.v(x.cos())

    assert rewrite(Other(), normal(2, 5, WIDTH)).ops == Counter(linear=3)


def test_the_same_product_twice_is_not_merged_with_itself(rewrite: Callable[..., Any]) -> None:
    class Same(Projections):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.q(x), self.q(x)

    assert set(rewrite(Same(), normal(2, 5, WIDTH)).ops) == {"linear"}


def test_a_product_with_an_activation_stays_apart(rewrite: Callable[..., Any]) -> None:
    class Activated(Projections):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return F.relu(self.q(x)), self.k(x), self.v(x)

    assert rewrite(Activated(), normal(2, 5, WIDTH)).ops == Counter(linear=2)


# --- a product and the rotation of its heads ---

HEAD_DIM = 4


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Rotating(nn.Module):
    """Llama's attention: 4 query heads, 2 key heads."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * HEAD_DIM, bias=bias) for n in (4, 2, 2))
        self.register_buffer("frequencies", normal(HEAD_DIM // 2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, HEAD_DIM).transpose(1, 2)

    def tables(self, positions: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor) -> Any:
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        cos, sin = self.tables(positions, v)
        return F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, enable_gqa=True)


class Swapped(Rotating):
    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, HEAD_DIM).permute(0, 2, 1, 3)


class Normed(Rotating):
    """As Qwen3: norms of queries and keys, before they are rotated."""

    def heads(self, x: Tensor) -> Tensor:
        return F.rms_norm(super().heads(x), (HEAD_DIM,), None, 1e-6)


class Scaled(Rotating):
    def heads(self, x: Tensor) -> Tensor:
        return super().heads(x * 2)


class Shown(Rotating):
    def forward(self, x: Tensor, positions: Tensor) -> Any:
        return super().forward(x, positions), self.heads(self.q(x))


class ValuesFirst(Rotating):
    def forward(self, x: Tensor, positions: Tensor) -> Any:
        v, k, q = (self.heads(part(x)) for part in (self.v, self.k, self.q))
        cos, sin = self.tables(positions, v)
        return F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, enable_gqa=True)


class KeysFirst(Rotating):
    def forward(self, x: Tensor, positions: Tensor) -> Any:
        k, q, v = (self.heads(part(x)) for part in (self.k, self.q, self.v))
        cos, sin = self.tables(positions, v)
        return F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, enable_gqa=True)


class Contextual(Rotating):
    def tables(self, positions: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().tables(positions * v.sum((1, 3)), v)


class TwoProducts(Rotating):
    def forward(self, x: Tensor, positions: Tensor) -> Any:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x.sin())), self.heads(self.v(x.sin()))
        cos, sin = self.tables(positions, v)
        return F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, enable_gqa=True)


POSITIONS = torch.arange(5.0).expand(2, 5) + torch.tensor([[0.0], [3.0]])


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites as for CUDA, of graphs that run here."""
    monkeypatch.setattr("burnish.rewrites.fuse.on_cuda", lambda node: True)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [Rotating, Swapped, KeysFirst])
def test_a_product_rotates_its_heads(cls: type[Rotating], bias: bool, rewrite: Callable[..., Any]) -> None:
    found = rewrite(cls(bias), X, POSITIONS)
    assert found.ops == Counter(linear_rope=1, attention=1)
    assert found.fused.matches == {"parallel linears": 1, "rope_qk": 1, "linear_rope": 1}
    _, weight, biases, cos, sin, *sizes = found.calls[0]
    assert [part.target for part in weight.args[0]] == (
        ["k.weight", "q.weight", "v.weight"] if cls is KeysFirst else ["q.weight", "k.weight", "v.weight"]
    )
    assert (biases is not None) == bias
    assert [cos.meta["val"].dim(), sin.meta["val"].dim(), *sizes] == [3, 3, HEAD_DIM, 6 * HEAD_DIM]
    assert Counter(tuple(unit.ops) for unit in found.verification.units) == {("linear_rope",): 3, ("attention",): 1}


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Normed, "q and k are not heads of two parts of one product"),
        (Scaled, "q and k are not heads of two parts of one product"),
        (Shown, "q and k are not heads of two parts of one product"),
        (TwoProducts, "q and k are not heads of two parts of one product"),
        (ValuesFirst, "q and k are not the first two parts of their product"),
        (Contextual, "the tables depend on linear"),
    ],
)
def test_heads_that_a_product_does_not_rotate(cls: type[Rotating], reason: str, rewrite: Callable[..., Any]) -> None:
    found = rewrite(cls(), X, POSITIONS)
    assert (found.ops["linear_rope"], found.ops["rope_qk"]) == (0, 1)
    assert reason in found.reasons


def test_a_product_on_the_cpu_does_not_rotate(rewrite: Callable[..., Any]) -> None:
    found = rewrite(Rotating(), X, POSITIONS)
    assert found.ops == Counter(linear=1, rope_qk=1, attention=1)


@pytest.mark.parametrize(("width", "interleaved"), [(HEAD_DIM, False), (HEAD_DIM, True), (HEAD_DIM - 2, False)])
def test_a_product_and_its_rotation_on_cuda(width: int, interleaved: bool) -> None:
    """In fake tensors, which need no such device; the tables come after the product, as in a model's first layer."""
    graph = fx.Graph()
    x, weight, angles = (graph.placeholder(name) for name in ("x", "weight", "angles"))
    with FakeTensorMode():
        for node, shape in ((x, X.shape), (weight, (8 * HEAD_DIM, WIDTH)), (angles, (1, 5, width))):
            node.meta["val"] = torch.empty(shape, device="cuda")

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        set_value(node)
        return node

    product = call(ops.linear.overload, x, weight, None, "none", None)
    parts = call(aten.split_with_sizes.default, product, [4 * HEAD_DIM, 2 * HEAD_DIM, 2 * HEAD_DIM], -1)
    q, k, v = (
        call(aten.transpose.int, call(aten.view.default, call(operator.getitem, parts, i), [2, 5, -1, HEAD_DIM]), 1, 2)
        for i in range(3)
    )
    cos, sin = call(aten.cos.default, angles), call(aten.sin.default, angles)
    turned = call(ops.rope_qk.overload, q, k, cos, sin, interleaved)
    graph.output((*(call(operator.getitem, turned, i) for i in range(2)), v))
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    graph.lint()
    if interleaved or width < HEAD_DIM:
        assert not record.matches
        said = "rope_qk_default: it rotates pairs of neighbours, or a part of each head"
        assert [miss for miss in record.near_misses if said in str(miss)]
        return
    assert record.matches == {"linear_rope": 1}
    (node,) = (node for node in graph.nodes if node.target is ops.linear_rope.overload)
    assert node.args == (x, weight, None, cos, sin, HEAD_DIM, 6 * HEAD_DIM)
    assert graph.output_node().args == ((q, k, v),)
