"""Small models that schedules are made of, written as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.pattern import call_module

HEADS = 4


class SelfAttention(nn.Module):
    """q, k, v apart, each split into heads: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.n_heads = HEADS

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[:-1] + (self.n_heads, -1)).permute(0, 2, 1, 3)  # noqa: RUF005 (people write it)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = self.dropout(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, dim=-1))
        return torch.matmul(weights, v).permute(0, 2, 1, 3).flatten(2)


class Projection(nn.Module):
    """Linear, dropout, residual, norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """The tutorial's: self attention and projection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width)
        self.proj = Projection(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.self_attn(x), x)


class LeNet(nn.Module):
    """Two Linears that a ReLU follows, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc1, self.relu1 = nn.Linear(64, 16), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(16, 12), nn.ReLU()
        self.fc3 = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = self.relu1(self.fc1(torch.flatten(x, 1)))
        return self.fc3(self.relu2(self.fc2(x)))


class Stack(nn.Module):
    """Equal layers, called in a loop."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def heads(x):
    return x.view(x.shape[:-1] + (HEADS, -1)).permute(0, 2, 1, 3)  # noqa: RUF005 (as in the model)


def projection(x):
    return heads(call_module(r"[qkv]_proj", x))


def core_attention(q, k, v):
    weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, dim=-1)
    return torch.matmul(call_module("dropout", weights), v)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def bias_dropout_residual_norm(x, bias, residual):
    return call_module("layer_norm", call_module("dropout", x + bias) + residual)
