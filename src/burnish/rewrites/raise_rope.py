"""Spellings of rotary position embedding -> the Op `rope`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from burnish import ops
from burnish.graph.matcher import Match
from burnish.rewrites.rewrite import Rewrite, same, values

aten = torch.ops.aten

_HALF = 37  # odd and unlikely, so that it cannot be taken for another number of the pattern


def rope_half_split(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """Hugging Face's rotate_half (Llama, GPT-NeoX, Qwen, ...); cos and sin are (batch or 1, 1, length, head_dim)."""
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (rotated * sin)


def to_rope(x: Any, cos: Any, sin: Any) -> Any:
    return ops.rope(x, aten.squeeze.dim(cos, 1), aten.squeeze.dim(sin, 1))


def _half_split_examples(dtype: torch.dtype) -> tuple[Any, ...]:
    table = torch.randn(1, 1, 5, 2 * _HALF, dtype=dtype)
    return torch.randn(2, 3, 5, 2 * _HALF, dtype=dtype), table, table.clone(), _HALF


def _refuse(match: Match) -> str | None:
    x, cos, sin, half = values(match, "x", "cos", "sin", "half")
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        return "cos or sin is a number"
    if x.dim() != 4 or cos.dim() != 4 or sin.dim() != 4:
        return f"x, cos, sin have {x.dim()}, {cos.dim()}, {sin.dim()} dims, not 4"
    if cos.shape[1] != 1 or sin.shape[1] != 1:
        return "cos and sin differ from head to head"
    if not same(2 * half, x.shape[-1]):
        return f"splits head_dim={x.shape[-1]} at {half}, not in the middle"
    if (dtype := torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype))) != x.dtype:
        return f"the result is {dtype}, x is {x.dtype}"
    return None


ROPE = [Rewrite("rope: half split", rope_half_split, to_rope, _half_split_examples, aten.neg.default, _refuse)]
