"""Jagged nested tensors: by the attention Op, and in and out of an optimized module as in PyTorch's SDPA tutorial."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish import ops
from burnish.numerics import assert_close, oracle, randn

LENGTHS = (3, 7, 1, 12)


def jagged(*lengths: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    parts = [randn(n, width, dtype=dtype, seed=seed + i) for i, n in enumerate(lengths)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


class CausalSelfAttention(nn.Module):
    """The tutorial's."""

    def __init__(self, num_heads: int = 2, width: int = 16, dropout: float = 0.0, is_causal: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.dropout, self.resid_dropout = dropout, nn.Dropout(dropout)
        self.num_heads, self.is_causal = num_heads, is_causal

    def forward(self, x: Tensor) -> Tensor:
        query_projected = self.c_attn(x)
        batch_size, embed_dim = query_projected.size(0), query_projected.size(2)
        head_dim = embed_dim // (self.num_heads * 3)
        q, k, v = (
            t.view(batch_size, -1, self.num_heads, head_dim).transpose(1, 2) for t in query_projected.chunk(3, -1)
        )
        dropout, is_causal = (self.dropout, self.is_causal) if self.training else (0.0, False)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(batch_size, -1, self.num_heads * head_dim)
        return self.resid_dropout(self.c_proj(y))


def assert_each(result: Tensor, model: nn.Module, nested: Tensor) -> None:
    exact = copy.deepcopy(model).double()
    for one, x in zip(result.unbind(), nested.unbind(), strict=True):
        with torch.no_grad():
            assert_close(one, model(x[None])[0], exact(x[None].double())[0])


@pytest.mark.parametrize("training", [False, True])
def test_nested_in_nested_out(training: bool) -> None:
    torch.manual_seed(0)
    model = CausalSelfAttention().train(training)
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    for lengths in (LENGTHS, (5, 2), (1,), (40, 1, 9)):
        x = jagged(*lengths)
        with torch.no_grad():
            result = fast(x)
        assert result.is_nested
        assert result.offsets() is x.offsets()
        assert result.shape == x.shape
        assert_each(result, model, x)
    assert fast.serving.nested.reasons == []
    assert (result + x).is_nested  # of one structure


def test_gradients_of_weights_and_inputs() -> None:
    torch.manual_seed(0)
    model = CausalSelfAttention().train()
    fast, exact = burnish.optimize(copy.deepcopy(model), cache="off"), copy.deepcopy(model).double()
    values = randn(sum(LENGTHS), 16).requires_grad_()
    x = torch.nested.nested_tensor_from_jagged(values, jagged(*LENGTHS).offsets())
    fast(x).values().square().sum().backward()
    found = [p.grad for p in fast.parameters()] + [values.grad]
    wanted = []
    for each, dtype in ((model, torch.float32), (exact, torch.float64)):
        leaf = values.detach().to(dtype).requires_grad_()
        sum(each(part[None]).square().sum() for part in leaf.split(LENGTHS)).backward()  # type: ignore[union-attr]
        wanted.append([p.grad for p in each.parameters()] + [leaf.grad])
    assert_close(found, *wanted)


class Two(nn.Module):
    """Positions, rows of several inputs, an output that is no value for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.layer = nn.Embedding(50, 16), CausalSelfAttention()

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        if x.is_nested:
            raise TypeError("its own code is not for nested tensors")
        h = x + self.position(torch.arange(x.shape[1], device=x.device)) * scale
        return {"hidden": self.layer(h) + y, "scale": scale}


def test_several_inputs_and_positions() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    x = jagged(*LENGTHS)
    y = torch.nested.nested_tensor_from_jagged(randn(sum(LENGTHS), 16, seed=9), x.offsets())
    with torch.no_grad():
        result = fast(x, y, scale=2.0)
    exact = copy.deepcopy(model).double()
    assert result["scale"] == 2.0
    for one, a, b in zip(result["hidden"].unbind(), x.unbind(), y.unbind(), strict=True):
        with torch.no_grad():
            eager, true = (m(a[None].to(d), b[None].to(d), scale=2.0)["hidden"][0] for m, d in
                           ((model, torch.float32), (exact, torch.float64)))  # fmt: skip
        assert_close(one, eager, true)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q).squeeze(1).mean(1)


def test_what_cannot_be_served_is_left_to_the_model_and_told() -> None:
    fast = burnish.optimize(Mean(), cache="off")
    with pytest.raises(Exception):  # noqa: B017  torch's own
        fast(jagged(3, 4))
    assert "an output has a value for each row" in fast.serving.nested.reasons[0]
    linear = burnish.optimize(nn.Linear(16, 4), cache="off")
    assert linear(jagged(3, 4)).is_nested  # torch's own
    assert "there is no attention" in linear.serving.nested.reasons[0]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op(is_causal: bool, dtype: torch.dtype) -> None:
    x = jagged(*LENGTHS, width=96, dtype=dtype)
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in x.chunk(3, dim=-1))
    result = ops.attention(q, k, v, is_causal=is_causal)
    assert result.shape == q.shape
    for one, *parts in zip(*(t.transpose(1, 2).unbind() for t in (result, q, k, v)), strict=True):
        args = (*(t.transpose(0, 1)[None] for t in parts), None, None, is_causal)
        assert_close(one.transpose(0, 1)[None], ops.attention.reference(*args), oracle(ops.attention.reference, *args))


def test_the_op_with_other_keys_than_queries() -> None:
    q = jagged(3, 1, width=16).unflatten(-1, (1, 16)).transpose(1, 2)
    k = jagged(5, 4, width=16, seed=5).unflatten(-1, (1, 16)).transpose(1, 2)
    result = ops.attention(q, k, k, is_causal=True)
    for one, a, b in zip(*(t.transpose(1, 2).unbind() for t in (result, q, k)), strict=True):
        args = a.transpose(0, 1)[None], *(b.transpose(0, 1)[None],) * 2, None, None, True
        assert_close(one.transpose(0, 1)[None], ops.attention.reference(*args), oracle(ops.attention.reference, *args))


def test_the_op_names_what_is_wrong() -> None:
    x = jagged(3, 4).unflatten(-1, (2, 8)).transpose(1, 2)
    dense = torch.randn(2, 2, 4, 8)
    with pytest.raises(TypeError, match="k is not nested; it must be a nested tensor"):
        ops.attention(x, dense, x)
    with pytest.raises(ValueError, match="dimension 2, without gaps, must be ragged"):
        ops.attention(*[x.transpose(1, 2)] * 3)
    with pytest.raises(TypeError, match="nested tensors take no bias"):
        ops.attention(x, x, x, torch.zeros(1))
    with pytest.raises(TypeError, match="rms_norm takes no nested tensors"):
        ops.rms_norm(x)
