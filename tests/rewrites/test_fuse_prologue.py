"""An RMS norm moves into the product that alone reads it, where there are few rows: what moves, what stays, and why."""

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

WIDTH, HEADS = 32, 4


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites as for CUDA, of graphs that run here."""
    monkeypatch.setattr("burnish.rewrites.fuse.on_cuda", lambda node: True)


class Block(nn.Module):
    """A pre-norm block and the next one's first norm and product. `length` fixes how many tokens there are."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.length = length
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*map(self.heads, (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(q.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x if self.length is None else x.view(1, self.length, WIDTH))

    def block(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Block):
    """As GPT-2, but for its norms."""

    def __init__(self, length: int | None) -> None:
        super().__init__(length)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(3))
        self.qkv, self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        x = x + self.attend(*self.qkv(self.norms[0](x)).split(WIDTH, dim=-1))
        x = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return self.head(self.norms[2](x))


class LlamaLike(Block):
    """Without the rotation of heads."""

    def __init__(self, length: int | None) -> None:
        super().__init__(length)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mlp = GatedMLP(WIDTH, 48, "silu", bias=False)

    def turn(self, x: Tensor) -> Tensor:
        return x

    def block(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attend(*(self.turn(part(normed)) for part in (self.q, self.k, self.v)))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("length", [1, 8])
def test_a_plain_block_of_few_tokens(length: int, rewrite: Callable[..., Any]) -> None:
    """Its three norms move: the first by itself, the others from behind a product that keeps its residual."""
    found = rewrite(Plain(length).bfloat16(), normal(1, length, WIDTH, dtype=torch.bfloat16))
    assert found.ops == Counter(rms_norm_linear=3, linear=2, attention=1)
    assert found.fused.matches["norm prologue"] == 3
    fused = [call for call in found.calls if len(call) == 6]
    assert [call[5] for call in fused] == ["none", "gelu_tanh", "none"]
    assert [call[3].target for call in fused] == ["qkv.weight", "up.weight", "head.weight"]
    out, down = (call for call in found.calls if len(call) == 5)
    assert (fused[1][0].args[1], fused[2][0].args[1]) == (out[1], down[1])
    assert down[4] is fused[1][0]  # what was summed is the next branch's residual
    moved = [unit for unit in found.verification.units if "rms_norm_linear" in unit.ops]
    assert len(moved) == 3


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("length", [1, 8])
def test_a_block_like_llama_of_few_tokens(length: int, rewrite: Callable[..., Any]) -> None:
    found = rewrite(LlamaLike(length).bfloat16(), normal(1, length, WIDTH, dtype=torch.bfloat16))
    # The gated MLP adds no residual, so the last norm is one with an addition.
    assert found.ops == Counter(rms_norm_linear=1, attention=1, linear=2, rms_norm_gated_mlp=1, add_rms_norm=1)
    assert found.fused.matches["norm prologue"] == 2
    assert "the addition before it would be a kernel of its own" in found.reasons
    first = found.calls[0]
    assert first[2] == 1e-5
    assert [part.target for part in first[3].args[0]] == ["q.weight", "k.weight", "v.weight"]


@pytest.mark.usefixtures("as_on_cuda")
def test_in_float32_too(rewrite: Callable[..., Any]) -> None:
    assert rewrite(Plain(8), normal(1, 8, WIDTH)).ops["rms_norm_linear"] == 3


@pytest.mark.usefixtures("as_on_cuda")
def test_layer_norms_stay_and_are_not_spoken_of(rewrite: Callable[..., Any]) -> None:
    found = rewrite(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40)), normal(1, 1, WIDTH))
    assert found.ops == Counter(layer_norm=1, linear=1)
    assert "norm prologue" not in found.reasons


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("cls", [Plain, LlamaLike])
@pytest.mark.parametrize(
    ("length", "shape", "reason"),
    [
        (None, (1, 5), "is not fixed; up to 8 a product normalizes them"),
        (None, (5, 1), "is not fixed"),
        (128, (1, 128), "there are 128 rows"),
        (9, (1, 9), "there are 9 rows; up to 8 a product normalizes them"),
    ],
)
def test_many_tokens_or_any_number(
    cls: type[Block], length: int | None, shape: tuple[int, int], reason: str, rewrite: Callable[..., Any]
) -> None:
    found = rewrite(cls(length).bfloat16(), normal(*shape, WIDTH, dtype=torch.bfloat16))
    assert not {"rms_norm_linear", "rms_norm_gated_mlp"} & set(found.ops)
    assert "norm prologue" not in found.fused.matches
    (miss,) = (miss for miss in found.fused.near_misses if miss.rewrite == "norm prologue")
    assert reason in str(miss)
    assert len(miss.nodes) == 3


@pytest.mark.parametrize("cls", [Plain, LlamaLike])
def test_on_the_cpu_norms_stay(cls: type[Block], rewrite: Callable[..., Any]) -> None:
    found = rewrite(cls(1), normal(1, 1, WIDTH))
    assert "norm prologue" not in found.fused.matches
    assert "norm prologue" not in found.reasons


class Rotating(LlamaLike):
    def __init__(self, length: int | None) -> None:
        super().__init__(length)
        self.register_buffer("angles", normal(1, 1, 1, WIDTH // HEADS // 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = (torch.cat((turn, turn), -1) for turn in (self.angles.cos(), self.angles.sin()))
        q, k = (self.heads(part) for part in (q, k))
        q, k = (x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, self.heads(v))
        return self.out(y.transpose(1, 2).reshape(v.shape))


@pytest.mark.usefixtures("as_on_cuda")
def test_a_product_that_rotates_stays(rewrite: Callable[..., Any]) -> None:
    found = rewrite(Rotating(1), normal(1, 1, WIDTH))
    assert found.ops["linear_rope"] == 1
    assert found.ops["rms_norm_gated_mlp"] == 1
    assert found.ops["rms_norm_linear"] == 0
    assert "rotates or appends heads in its epilogue" in found.reasons


# --- one norm and its readers, in fake tensors on a device that need not be there ---------------------------------

Read = Callable[..., Any]


def _graph(build: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> fx.Graph:
    """What `build(call, *placeholders of these shapes)` returns, as a graph on CUDA."""
    graph = fx.Graph()
    given = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    with FakeTensorMode():
        for node, shape in zip(given, shapes, strict=True):
            node.meta["val"] = torch.empty(shape, device="cuda", dtype=dtype)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target.overload if isinstance(target, Op) else target, args)
        set_value(node)
        return node

    graph.output(build(call, *given))
    return graph


X, W = (1, 4, 64), (48, 64)


def test_a_norm_and_its_product_on_cuda() -> None:
    def build(call: Read, x: Any, w: Any, v: Any, b: Any) -> Any:
        return call(ops.linear, call(ops.rms_norm, x, v, 1e-5), w, b, "gelu", None)

    graph = _graph(build, X, W, (64,), (48,))
    x, w, v, b = (node for node in graph.nodes if node.op == "placeholder")
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    assert record.matches == {"norm prologue": 1}
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    assert node.target is ops.rms_norm_linear.overload
    assert node.args == (x, v, 1e-5, w, b, "gelu")
    assert node.meta["val"].shape == (1, 4, 48)


@pytest.mark.parametrize("kept", [False, True])
def test_the_sum_before_a_norm_is_the_products(kept: bool) -> None:
    """Also where its getitem comes after the product that moves."""

    def build(call: Read, x: Any, w: Any, residual: Any, up: Any) -> Any:
        both = call(ops.linear_add_rms_norm, x, w, None, residual, None, 1e-6, True)
        out = call(ops.linear, call(operator.getitem, both, 0), up)
        return (out, call(operator.getitem, both, 1)) if kept else (out,)

    graph = _graph(build, X, (64, 64), X, W)
    x, w, residual, up = (node for node in graph.nodes if node.op == "placeholder")
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    graph.lint()
    assert record.matches == {"norm prologue": 1, **({} if kept else {"unread sums": 1})}
    total, out = (node for node in graph.nodes if node.op == "call_function")
    assert total.args == (x, w, None, "none", residual)
    assert out.args[:4] == (total, None, 1e-6, up)
    assert graph.output_node().args == ((out, total) if kept else (out,),)


def _normed(call: Read, x: Any) -> Any:
    return call(ops.rms_norm, x, None, 1e-6)


def _two_readers(call: Read, x: Any, w: Any) -> Any:
    normed = _normed(call, x)
    return call(ops.linear, normed, w), call(torch.ops.aten.sin.default, normed)


def _own_residual(call: Read, x: Any, w: Any) -> Any:
    normed = _normed(call, x)
    return call(ops.linear, normed, w, None, "none", normed)


def _residual(call: Read, x: Any, w: Any) -> Any:
    return call(ops.linear, _normed(call, x), w, None, "none", x)


def _k_major(call: Read, x: Any, w: Any) -> Any:
    return call(ops.linear, _normed(call, x), call(torch.ops.aten.t.default, w))


def _after_sum(call: Read, x: Any, w: Any) -> Any:
    return call(ops.linear, call(operator.getitem, call(ops.add_rms_norm, x, x), 0), w)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_two_readers, "rms_norm_default: its result is read by linear_default, sin_default"),
        (_own_residual, "linear_default reads it as more than its x"),
        (_residual, "linear_default adds a residual"),
        (_k_major, "a weight of linear_default is stored (K, N)"),
        (_after_sum, "the addition before it would be a kernel of its own"),
    ],
)
def test_what_stays_says_why(build: Callable[..., Any], reason: str) -> None:
    graph = _graph(build, X, (64, 64))
    before = list(graph.nodes)
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    assert "norm prologue" not in record.matches
    if build is not _after_sum:  # which loses the sum that nobody reads
        assert list(graph.nodes) == before
    (miss,) = (miss for miss in record.near_misses if miss.rewrite == "norm prologue")
    assert reason in str(miss)


def test_of_float64_it_stays() -> None:
    graph = _graph(lambda call, x, w: call(ops.linear, _normed(call, x), w), X, W, dtype=torch.float64)
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    assert not record.matches
    assert "it is of torch.float64; the kernel takes" in "\n".join(map(str, record.near_misses))


def test_a_norm_that_no_product_reads_is_not_spoken_of() -> None:
    graph = _graph(lambda call, x: call(torch.ops.aten.sin.default, _normed(call, x)), X)
    record = apply("fuse", FUSE, fx.GraphModule({}, graph))
    assert not [miss for miss in record.near_misses if miss.rewrite == "norm prologue"]
