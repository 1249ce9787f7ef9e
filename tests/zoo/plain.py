"""Transformer parts in plain PyTorch, as people write them by hand: the zoo's models that need no Hugging Face.

Each class keeps one spelling of attention, norm or MLP that is common in the wild, because the spelling is what a
rewrite has to recognise. None of them is meant to be the best way to write it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OptionalBiasLayerNorm(nn.Module):
    """Layer norm over the last dimension whose bias may be absent, through `F.layer_norm`: nanoGPT's spelling."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    """nanoGPT's causal attention, (B, S, D) -> (B, S, D): one QKV linear, split, then SDPA or a written-out softmax."""

    def __init__(self, width: int, heads: int, max_seq: int, bias: bool, sdpa: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.sdpa = sdpa
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.tril: Tensor
        if not sdpa:
            self.register_buffer("tril", torch.tril(torch.ones(max_seq, max_seq)).view(1, 1, max_seq, max_seq))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q = q.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        k = k.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        v = v.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)
        if self.sdpa:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.tril[:, :, :seq, :seq] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(scores, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(batch, seq, width)
        return self.resid_dropout(self.c_proj(y))


class NanoMLP(nn.Module):
    """Linear, GELU (erf), linear, dropout."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NanoBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, max_seq: int, bias: bool, sdpa: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1 = OptionalBiasLayerNorm(width, bias)
        self.attn = NanoAttention(width, heads, max_seq, bias, sdpa, dropout)
        self.ln_2 = OptionalBiasLayerNorm(width, bias)
        self.mlp = NanoMLP(width, bias, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A GPT in nanoGPT's manner, token ids (B, S) -> logits (B, S, vocab); the head shares the embedding's weight."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        max_seq: int,
        vocab: int,
        bias: bool,
        sdpa: bool,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(max_seq, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(NanoBlock(width, heads, max_seq, bias, sdpa, dropout) for _ in range(layers))
        self.ln_f = OptionalBiasLayerNorm(width, bias)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(0, ids.size(1), dtype=torch.long, device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class SelfAttention(nn.Module):
    """The notebook's single-head attention, x (B, S, D) and mask (S, S) or (B, 1, S) with 0 = hidden.

    Scores are divided by sqrt(D) and hidden ones are set to -1e3 (not to -inf).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / (self.width**0.5)
        scores = scores.masked_fill(mask == 0, -1e3)
        return self.out_proj(torch.matmul(scores.softmax(dim=-1), v))


class MultiHeadSelfAttention(nn.Module):
    """The notebook's multi-head attention, scaled like `SelfAttention` by 1/sqrt(D), not by 1/sqrt(D / heads)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, self.width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        scores = torch.matmul(q, k.transpose(-2, -1)) / (self.width**0.5)
        scores = scores.masked_fill(mask == 0, -1e3)
        out = torch.matmul(scores.softmax(dim=-1), v)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape[0], -1, self.width))


class DecoderBlock(nn.Module):
    """The notebook's decoder block: attention and a GELU feed-forward, each with residual and layer norm.

    `pre_norm=False` normalises after each residual sum (the 2017 order), `pre_norm=True` before each branch.
    """

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = MultiHeadSelfAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.feed_forward(x))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout) -> Tensor:
    """dropout(softmax(q k^T / sqrt(d))) v, over (B, H, S, d)."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return torch.matmul(dropout(F.softmax(scores, dim=-1)), v)


class SlapoSelfAttention(nn.Module):
    """Separate q, k, v linears, each viewed as heads with `shape[:-1] + (heads, -1)` and permuted."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.heads = heads

    def permute_for_scores(self, x: Tensor) -> Tensor:
        return x.view((*x.shape[:-1], self.heads, -1)).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q = self.permute_for_scores(self.q_proj(hidden_states))
        k = self.permute_for_scores(self.k_proj(hidden_states))
        v = self.permute_for_scores(self.v_proj(hidden_states))
        out = scaled_dot_product(q, k, v, self.dropout).permute(0, 2, 1, 3).contiguous()
        return out.view((*out.shape[:2], -1))


class SlapoProjection(nn.Module):
    """Linear, dropout, residual, layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.dense(hidden_states)) + residual)


class SlapoAttention(nn.Module):
    """The Slapo tutorial's Attention, mended: permutes are used, dropout is for training, the residual is added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SlapoSelfAttention(width, heads)
        self.proj = SlapoProjection(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(self.self_attn(hidden_states), hidden_states)


class CausalSelfAttention(nn.Module):
    """The SDPA tutorial's attention, (B, S, D) -> (B, S, D). Its quirk: causal in train mode, full in eval mode."""

    def __init__(self, width: int, heads: int, bias: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.dropout = dropout
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        projected = self.c_attn(x)
        batch = projected.size(0)
        head_dim = projected.size(2) // (self.heads * 3)
        q, k, v = projected.chunk(3, -1)
        q = q.view(batch, -1, self.heads, head_dim).transpose(1, 2)
        k = k.view(batch, -1, self.heads, head_dim).transpose(1, 2)
        v = v.view(batch, -1, self.heads, head_dim).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=self.training)
        y = y.transpose(1, 2).view(batch, -1, self.heads * head_dim)
        return self.resid_dropout(self.c_proj(y))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), (..., D) -> (..., D); `activation` is silu, gelu or gelu_tanh."""

    def __init__(self, width: int, intermediate: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=bias)
        self.up_proj = nn.Linear(width, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, width, bias=bias)
        self.act = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
