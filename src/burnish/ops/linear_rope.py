"""A linear layer whose first columns are heads that leave it rotated: the merged q, k, v product of Llama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved, gradients_of
from burnish.kernels.layout import layout_reasons, wgmma_reasons
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, check_floating, nbytes, not_same_dtype
from burnish.ops._triton import hopper_why_not
from burnish.ops.linear import linear
from burnish.ops.rope import rope, rope_tables, turned_back


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> None:
    linear.check(x, weight, bias)
    check_floating("cos", cos)
    check_floating("sin", sin)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, sequence, K)")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be positive and even")
    if rotated <= 0 or rotated % head_dim or rotated > weight.shape[0]:
        raise ValueError(
            f"rotated is {rotated}; it must be a positive multiple of head_dim {head_dim}, at most the "
            f"{weight.shape[0]} rows of weight"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}; it must be that of cos, {tuple(cos.shape)}")
    fits = cos.dim() in (2, 3) and cos.shape[-2] == x.shape[1] and cos.shape[-1] == head_dim
    if not fits or (cos.dim() == 3 and cos.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; for x of {tuple(x.shape)} it must be (S, {head_dim}) or "
            f"(1 or B, S, {head_dim})"
        )


def _cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> Cost:
    product = linear.cost(x, weight, bias)
    return Cost(product.flops + 3 * x.shape[0] * x.shape[1] * rotated, product.bytes + nbytes(cos, sin))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(n: int, k: int, seed: int) -> Tensor:
        return tensor(n, k, seed=seed) / k**0.5

    def tables(length: int, width: int, offset: int = 0) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, False))

    x, weight, bias = tensor(2, 33, 96, seed=0), weights(512, 96, seed=1), tensor(512, seed=2)
    grouped = (64, 384)  # 4 query heads, 2 key heads, and values of 2
    yield Sample("bias", (x, weight, bias, *tables(33, 64), *grouped))
    yield Sample("no bias", (x, weight, None, *tables(33, 64), *grouped))
    batched = [torch.stack(pair) for pair in zip(tables(33, 64), tables(33, 64, offset=100), strict=True)]
    yield Sample("table per row", (x, weight, bias, *batched, *grouped))
    yield Sample("shared batched table", (x, weight, None, *(t[None] for t in tables(33, 64)), *grouped))
    yield Sample("float32 tables", (x, weight, bias, *(t.float() for t in tables(33, 64)), *grouped))
    yield Sample("all rotated", (x, weight[:384], bias[:384], *tables(33, 64), *grouped))
    wide = weights(400, 256, seed=3)  # 1 head each, and 16 columns that are no head
    yield Sample("head_dim 128", (tensor(1, 40, 256, seed=4), wide, None, *tables(40, 128), 128, 256))
    few, small = tensor(2, 7, 96, seed=5), (weights(130, 96, seed=6), tensor(130, seed=7))
    yield Sample("head_dim 20", (few, *small, *tables(7, 20), 20, 80))
    across = tensor(2, 96, 7, seed=8).transpose(1, 2)
    yield Sample("transposed x", (across, *small, *tables(7, 20), 20, 120))
    yield Sample("one position", (x[:, :1].contiguous(), weight, None, *tables(1, 64, offset=5), *grouped))


def _shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _heads(product: Tensor, head_dim: int, rotated: int) -> Tensor:
    """The columns to rotate, as (B, H, S, D): a view."""
    return product[..., :rotated].unflatten(-1, (rotated // head_dim, head_dim)).transpose(1, 2)


def _turn(product: Tensor, cos: Tensor, sin: Tensor, head_dim: int, rotated: int) -> Tensor:
    turned = rope.reference(_heads(product, head_dim, rotated), cos, sin)
    return torch.cat((turned.transpose(1, 2).flatten(2), product[..., rotated:]), dim=-1)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear_rope(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> Tensor:
    """`x @ weight.T + bias`, in whose first `rotated` columns each head of `head_dim` is rotated as by `rope`.

    The other columns pass unchanged.
    Shapes: x (B, S, K); weight (N, K), of any strides; bias (N,) or None; cos and sin (S, head_dim) or
    (B or 1, S, head_dim), full width, both halves alike; head_dim even, `rotated` a positive multiple of it and at most
    N. The result is (B, S, N), contiguous.
    Dtypes: x, weight and bias the same floating one; cos and sin floating, they may differ. The product is rounded to
    x's dtype, rotated from there in float32 (float64 for float64), and rounded; an Impl may leave the first rounding
    out.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes that differ and for integers.
    Source: Su et al., "RoFormer", arXiv:2104.09864; half-split as in GPT-NeoX and Hugging Face's Llama.
    """
    return _turn(F.linear(x, weight, bias), cos, sin, head_dim, rotated)


def _torch_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> list[str]:
    return not_same_dtype("cos", cos, "x", x) + not_same_dtype("sin", sin, "x", x)


@linear_rope.impl("torch", why_not=_torch_why_not)
def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> Tensor:
    """F.linear, then the rotation of halves in place."""
    out = F.linear(x, weight, bias).contiguous()
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = _heads(out, head_dim, rotated).chunk(2, dim=-1)
    (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    unturned = first.clone()
    first.mul_(cos_1).addcmul_(second, sin_1, value=-1)
    second.mul_(cos_2).addcmul_(unturned, sin_2)
    return out


def _empty_heads(x: Tensor, head_dim: int, rotated: int) -> Tensor:
    """Of the shape, dtype and device of the heads to rotate, with the memory of one entry."""
    return x.new_empty(()).expand(x.shape[0], rotated // head_dim, x.shape[1], head_dim)


def _torch_triton_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> list[str]:
    return rope.impls["triton"].why_not(_empty_heads(x, head_dim, rotated), cos, sin)


def _torch_triton_configs(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> list[Any]:
    from burnish.kernels.rope import rope_configs

    return rope_configs(_empty_heads(x, head_dim, rotated), None, head_dim)


@linear_rope.impl("torch_triton", why_not=_torch_triton_why_not, configs=_torch_triton_configs)
def _torch_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    rotated: int,
    *,
    config: Any = None,
) -> Tensor:
    """F.linear, then the rotation in place by one Triton kernel."""
    from burnish.kernels.rope import rope_in_place

    out = F.linear(x, weight, bias).contiguous()
    rope_in_place(_heads(out, head_dim, rotated), cos, sin, config)
    return out


def _register_product(name: str) -> None:
    """An Impl by `linear`'s of that name, then the rotation in place."""
    product = linear.impls[name]

    def why_not(
        x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
    ) -> list[str]:
        reasons = product.why_not(x, weight, bias, "none", None)
        return list(dict.fromkeys(reasons + _torch_triton_why_not(x, weight, bias, cos, sin, head_dim, rotated)))

    def configs(
        x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
    ) -> Sequence[Any]:
        assert product.configs is not None
        return product.configs(x, weight, bias, "none", None)

    def impl(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
        rotated: int,
        *,
        config: Any = None,
    ) -> Tensor:
        from burnish.kernels.rope import rope_in_place

        out: Tensor = product.fn(x, weight, bias, config=config)
        rope_in_place(_heads(out, head_dim, rotated), cos, sin)
        return out

    impl.__doc__ = f"The product by `linear`'s {name}, then the rotation in place by one Triton kernel."
    linear_rope.impl(name, why_not=why_not, configs=configs)(impl)


for _name in ("triton", "triton_gemv", "triton_skinny"):  # made for few rows, which cuBLAS is slow with
    _register_product(_name)

_HEAD_DIMS = (64, 128)  # of which a tile of the product holds whole heads


def _gluon_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> list[str]:
    reasons = hopper_why_not(x) + layout_reasons(x, (weight,)) + wgmma_reasons(x, (weight,))
    if head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim is {head_dim}; the kernel takes 64 and 128")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (*HALF_TYPES, torch.float32):
            reasons.append(f"{name} is {table.dtype}; the kernel takes float16, bfloat16 and float32")
        if table.stride(-1) != 1:
            reasons.append(f"{name} has strides {table.stride()}; its rows must be contiguous")
    if cos.stride() != sin.stride():
        reasons.append(f"cos has strides {cos.stride()}, sin {sin.stride()}; they must be equal")
    return reasons


def _gluon_configs(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> list[Any]:
    from burnish.kernels.matmul_configs import Product
    from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_rope_configs

    return matmul_wgmma_rope_configs(Product.of(x, weight), head_dim)


@linear_rope.impl("gluon", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    rotated: int,
    *,
    config: Any = None,
) -> Tensor:
    """A Gluon kernel for Hopper that rotates in its epilogue: q and k have no pass of their own."""
    from burnish.kernels.matmul_wgmma import matmul_wgmma_rope

    return matmul_wgmma_rope(x, weight, bias, cos, sin, head_dim, rotated, config=config)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The product is not kept: only the gradients of the tables, which models do not train, would need it."""
    tensors = x, weight, bias, cos, sin
    return linear_rope(*tensors, head_dim, rotated), tensors


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 7
    x, weight, bias, cos, sin = saved.kept
    head_dim, rotated = saved.args[5:]
    need_x, need_weight, need_bias, *need_tables, _, _ = saved.needed
    dcos = dsin = None
    if any(need_tables):
        product = F.linear(x, weight, bias)
        _, dcos, dsin = gradients_of(
            lambda product, cos, sin: _turn(product, cos, sin, head_dim, rotated),
            (product, cos, sin),
            (False, *need_tables),
            (grad,),
        )
    if not (need_x or need_weight or need_bias):
        return None, None, None, dcos, dsin, None, None
    turned = rope(_heads(grad, head_dim, rotated), cos, turned_back(sin, False))
    dproduct = torch.cat((turned.transpose(1, 2).flatten(2), grad[..., rotated:]), dim=-1)
    rows = dproduct.flatten(0, 1)
    return (
        torch.matmul(dproduct, weight) if need_x else None,
        torch.mm(rows.t(), x.flatten(0, 1)) if need_weight else None,
        rows.sum(0) if need_bias else None,
        dcos,
        dsin,
        None,
        None,
    )


linear_rope.differentiate(_forward, _backward)
