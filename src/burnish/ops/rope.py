"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved, gradients_of
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, check_floating, nbytes, not_same_dtype, wide
from burnish.ops._triton import triton_why_not


def _check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    check_floating("x", x)
    check_floating("cos", cos)
    check_floating("sin", sin)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, heads, sequence, head_dim)")
    if cos.shape != sin.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}; it must be that of cos, {tuple(cos.shape)}")
    if (
        cos.dim() not in (2, 3)
        or cos.shape[-2] != x.shape[2]
        or (cos.dim() == 3 and cos.shape[0] not in (1, x.shape[0]))
    ):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; for x of {tuple(x.shape)} it must be (S, R) or (1 or B, S, R)"
        )
    if cos.shape[-1] > x.shape[-1] or cos.shape[-1] % 2:
        raise ValueError(f"cos has {cos.shape[-1]} columns; it must be an even number up to head_dim {x.shape[-1]}")


def _cost(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Cost:
    rotated = x.shape[0] * x.shape[1] * x.shape[2] * cos.shape[-1]
    return Cost(3 * rotated, 2 * nbytes(x) + nbytes(cos, sin))


def rope_tables(length: int, width: int, offset: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of positions from `offset` on, (length, width) of float64, as samples have them."""
    angles = torch.outer(
        torch.arange(offset, offset + length, dtype=torch.float64),
        10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width),
    )
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tables(length: int, width: int, offset: int = 0, interleaved: bool = False) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, interleaved))

    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    x = tensor(2, 3, 17, 32, seed=0)
    yield Sample("half-split", (x, *tables(17, 32)))
    yield Sample("interleaved", (x, *tables(17, 32, interleaved=True), True))
    yield Sample("partial", (x, *tables(17, 20)))
    yield Sample("partial interleaved", (x, *tables(17, 20, interleaved=True), True))
    yield Sample("one position", (x[:, :, :1].contiguous(), *tables(1, 32, offset=5)))
    batched = [torch.stack(pair) for pair in zip(tables(17, 32), tables(17, 32, offset=100), strict=True)]
    yield Sample("table per row", (x, *batched))
    yield Sample("shared batched table", (x, *(t[None] for t in tables(17, 32))))
    yield Sample("heads last in memory", (tensor(2, 17, 3, 32, seed=1).transpose(1, 2), *tables(17, 32)))
    packed = tensor(2, 17, 3 * 3 * 32, seed=2).view(2, 17, 9, 32)[:, :, 3:6].transpose(1, 2)
    yield Sample("a slice of packed q, k, v", (packed, *tables(17, 32)))
    yield Sample("float32 tables", (x, *(t.float() for t in tables(17, 32))))
    yield Sample("1x32x128x64", (tensor(1, 128, 32, 64, seed=3).transpose(1, 2), *tables(128, 64)))


def _shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`x * cos + rotate(x) * sin` on the first R of the last dimension; the rest passes unchanged.

    `rotate` takes the two halves (a, b) of the R entries to (-b, a), or, interleaved, each pair (a, b) to (-b, a).
    Shapes: x (B, H, S, D); cos and sin (S, R) or (B or 1, S, R), R even and at most D, full width: both halves alike,
    or, interleaved, both of each pair. The result is x's, laid out in memory as torch.empty_like(x).
    Dtypes: all floating; cos and sin may differ from x. Computed in float32 (float64 for float64), rounded once to x's.
    Errors: ValueError for sizes that do not fit, TypeError for integers.
    Source: Su et al., "RoFormer", arXiv:2104.09864; half-split as in GPT-NeoX and Hugging Face's Llama.
    """
    width = cos.shape[-1]
    cos, sin = (t if t.dim() == 2 else t.unsqueeze(1) for t in (cos, sin))
    turned = x[..., :width].to(wide(x.dtype))
    if interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    turned = (turned * cos + rotated * sin).to(x.dtype)
    return torch.empty_like(x).copy_(torch.cat((turned, x[..., width:]), dim=-1))


def _torch_why_not(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    return not_same_dtype("cos", cos, "x", x) + not_same_dtype("sin", sin, "x", x)


@rope.impl("torch", why_not=_torch_why_not)
def _torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Four passes over halves, straight into the result."""
    width = cos.shape[-1]
    if interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    else:
        first, second = slice(0, width // 2), slice(width // 2, width)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(x)
    for here, there, sign in ((first, second, -1), (second, first, 1)):
        part = out[..., here]
        torch.mul(x[..., here], cos[..., here], out=part)
        part.addcmul_(x[..., there], sin[..., here], value=sign)
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
    return out


_MAX_HEAD_DIM = 1024  # as in burnish.kernels.rope, which needs triton


def _triton_why_not(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    reasons = triton_why_not(x)
    if x.shape[-1] > _MAX_HEAD_DIM:
        reasons.append(f"head_dim {x.shape[-1]} is above {_MAX_HEAD_DIM}")
    if cos.shape[-1] == 0:
        reasons.append("cos and sin have no columns: nothing is rotated")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (*HALF_TYPES, torch.float32):
            reasons.append(f"{name} is {table.dtype}; the kernel takes float16, bfloat16 and float32")
    return reasons


def _triton_configs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[Any]:
    from burnish.kernels.rope import rope_configs

    return rope_configs(x, None, cos.shape[-1])


@rope.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, config: Any = None) -> Tensor:
    """One pass over memory, several heads of a position at a time."""
    from burnish.kernels import rope as kernels

    return kernels.rope(x, cos, sin, interleaved, config)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Keeps x only for the gradients of the tables, which models do not train."""
    of_tables = cos.requires_grad or sin.requires_grad
    return rope(x, cos, sin, interleaved), (x if of_tables else None, cos, sin)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return None, None, None, None
    x, cos, sin = saved.kept
    interleaved: bool = saved.args[3]
    need_x, *need_tables, _ = saved.needed
    dcos = dsin = None
    if any(need_tables):
        needed = (False, *need_tables, False)
        _, dcos, dsin, _ = gradients_of(rope.reference, (x, cos, sin, interleaved), needed, (grad,))
    return rope(grad, cos, turned_back(sin, interleaved), interleaved) if need_x else None, dcos, dsin, None


def turned_back(sin: Tensor, interleaved: bool) -> Tensor:
    """The sines with which `rope` is the derivative of itself: negated, and of each pair the other's, which matters
    only where the two are not alike."""
    width = sin.shape[-1]
    if interleaved:
        return sin.unflatten(-1, (width // 2, 2)).flip(-1).flatten(-2).neg()
    return sin.roll(width // 2, -1).neg()


rope.differentiate(_forward, _backward)
