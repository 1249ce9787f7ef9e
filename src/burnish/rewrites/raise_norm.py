"""Spellings of layer norm and RMS norm -> the Ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import ops
from burnish.graph.matcher import Match
from burnish.rewrites.rewrite import Rewrite, values

aten = torch.ops.aten


def _norm_examples(dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    return torch.randn(2, 3, 8, dtype=dtype), torch.randn(8, dtype=dtype), 1e-5


def _layer_norm_examples(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    x, weight, eps = _norm_examples(dtype)
    return x, weight, weight.clone(), eps


# --- layer norm: torch's own ----------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (8,), weight, bias, eps)


def to_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return ops.layer_norm(x, weight, bias, eps)


def _last_dim_only(match: Match) -> str | None:
    (weight,) = values(match, "weight")
    if weight is not None and weight.dim() != 1:
        return f"normalizes over the last {weight.dim()} dims, not over one"
    return None


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


def _weight_is_vector(match: Match) -> str | None:
    x, weight = values(match, "x", "weight")
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != x.shape[-1]):
        return f"weight of shape {tuple(weight.shape)} is not one factor for each of the last dim"
    if weight is not None and torch.result_type(x, weight) != x.dtype:
        return f"the result is {torch.result_type(x, weight)}, x is {x.dtype}"
    return None


NORM = [
    Rewrite("layer_norm", layer_norm, to_layer_norm, _layer_norm_examples, aten.layer_norm.default, _last_dim_only),
    *(
        Rewrite(f"rms_norm: {spelling.__name__}", spelling, to_rms_norm, _norm_examples, anchor, _weight_is_vector)
        for spelling, anchor in (
            (rms_norm_llama, aten.rsqrt.default),
            (rms_norm_t5, aten.rsqrt.default),
            (rms_norm_float, aten.rsqrt.default),
            (rms_norm_torch, aten.rms_norm.default),
        )
    ),
]
