"""Spellings of layer norm and RMS norm -> the Ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from burnish import ops
from burnish.rewrites.raise_layer_norm import LAYER_NORM_WRITTEN_OUT, refuse_weights
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, rewrite_nodes

aten = torch.ops.aten


def _norm_examples(dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    return torch.randn(2, 3, 8, dtype=dtype), torch.randn(8, dtype=dtype), 1e-5


# --- layer norm: torch's own ----------------------------------------------------------------------


def _to_layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
    return ops.layer_norm(input, weight, bias, *rest[:1])


def _last_dim_only(node: fx.Node, args: dict[str, Any]) -> str | None:
    if (dims := len(args["normalized_shape"])) != 1:
        return f"normalized_shape has {dims} entries: not the last dim alone is normalized"
    return None


def raise_layer_norm(graph_module: fx.GraphModule) -> Outcome:
    """`layer_norm(x, (n,), weight, bias, eps)`, as nn.LayerNorm and F.layer_norm leave it."""
    return rewrite_nodes(graph_module, aten.layer_norm.default, _to_layer_norm, _last_dim_only)


# --- RMS norm: computed in float32, rounded, then scaled (Llama, Qwen, Mistral) -------------------


def rms_norm_llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden = x.to(torch.float32)
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


# --- RMS norm: the mean in float32, the product in the input's dtype (T5) -------------------------


def rms_norm_t5(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


# --- RMS norm: all in float32, rounded once (nanoGPT derivatives, Llama's own repository) ---------


def rms_norm_float(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden = x.float()
    return (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (8,), weight, eps)


def to_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, eps)


NORM: list[Rewrite | GraphPass] = [
    GraphPass("layer_norm", raise_layer_norm),
    *LAYER_NORM_WRITTEN_OUT,
    *(
        Rewrite(f"rms_norm: {spelling.__name__}", spelling, to_rms_norm, _norm_examples, anchor, refuse_weights)
        for spelling, anchor in (
            (rms_norm_llama, aten.rsqrt.default),
            (rms_norm_t5, aten.rsqrt.default),
            (rms_norm_float, aten.rsqrt.default),
            (rms_norm_torch, aten.rms_norm.default),
        )
    ),
]
