"""Scaled dot-product attention with grouped heads, causality, windows, padding and bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops import _attention_cpu, _attention_cuda
from burnish.ops._common import check_floating, check_same_dtype, nbytes, not_on_cpu, wide
from burnish.ops._masks import additive_mask, allowed_pairs, attended_pairs
from burnish.ops._triton import triton_why_not

_MAX_HEAD_DIM = 512  # of the Triton kernel; in float32 half of it


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        check_same_dtype(name, tensor, "q", q)
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (batch, heads, length, head_dim)")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; for q of {tuple(q.shape)} it must have its batch and head_dim, and a "
            "number of heads that divides q's"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be k's {tuple(k.shape)} up to the last dimension")
    if key_padding_mask is not None and key_padding_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (batch, keys), "
            f"({k.shape[0]}, {k.shape[2]})"
        )
    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        raise TypeError(
            f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be bool or integer, nonzero for a real "
            "token (an additive mask goes to bias)"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if bias is not None:
        _check_bias(bias, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def _check_bias(bias: Tensor, full: tuple[int, ...]) -> None:
    if bias.dtype != torch.bool:
        check_floating("bias", bias)
    sizes = zip(reversed(bias.shape), reversed(full), strict=False)
    if bias.dim() > 4 or any(size != 1 and size != whole for size, whole in sizes):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must broadcast to (B, Hq, Lq, Lk), {tuple(full)}")


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Cost:
    batch, heads, length, width = q.shape
    pairs = batch * heads * attended_pairs(length, k.shape[2], is_causal, window)
    out = batch * heads * length * v.shape[3] * q.element_size()
    return Cost(2 * pairs * (width + v.shape[3]), nbytes(q, k, v, bias, key_padding_mask) + out)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def qkv(b: int, hq: int, hkv: int, lq: int, lk: int, d: int, dv: int | None = None) -> tuple[Tensor, ...]:
        # As projections leave them: heads next to each other in memory, (B, L, H, D).
        shapes = (b, lq, hq, d), (b, lk, hkv, d), (b, lk, hkv, dv or d)
        return tuple(tensor(*shape, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes))

    def padding(b: int, lk: int, dtype: torch.dtype = torch.bool) -> Tensor:
        lengths = torch.linspace(1, lk, b, device=device).long()
        return (torch.arange(lk, device=device) < lengths[:, None]).to(dtype)

    square, cross = qkv(2, 4, 4, 33, 33, 32), qkv(2, 4, 4, 7, 130, 32)
    grouped, decode = qkv(2, 4, 2, 33, 33, 16), qkv(2, 8, 2, 1, 77, 16)
    bool_bias = tensor(2, 1, 33, 33, seed=5) > 0
    yield Sample("full", square)
    yield Sample("causal", square, {"is_causal": True})
    yield Sample("window", square, {"is_causal": True, "window": 5})
    yield Sample("two-sided window", square, {"window": 5})
    yield Sample("padding", square, {"key_padding_mask": padding(2, 33)})
    yield Sample("left padding, causal", square, {"key_padding_mask": padding(2, 33).flip(1), "is_causal": True})
    yield Sample("integer padding", square, {"key_padding_mask": padding(2, 33, torch.int64)})
    yield Sample("no real token", square, {"key_padding_mask": padding(2, 33) & (padding(2, 33).sum(1, True) > 1)})
    yield Sample("bias", (*square, tensor(2, 4, 33, 33, seed=3)))
    yield Sample("bias per head", (*square, tensor(1, 4, 33, 33, seed=4)), {"key_padding_mask": padding(2, 33)})
    yield Sample("bias without batch and heads", (*square, tensor(33, 33, seed=4)), {"is_causal": True})
    yield Sample("boolean bias", (*square, bool_bias))
    yield Sample("boolean bias, rows of false", (*square, bool_bias & (torch.arange(33, device=device)[:, None] > 3)))
    yield Sample("scale", square, {"scale": 1.0})
    yield Sample("cross", cross)
    yield Sample("cross causal", cross, {"is_causal": True})
    yield Sample("more queries than keys, causal", qkv(2, 4, 4, 33, 7, 32), {"is_causal": True})
    yield Sample("grouped", grouped)
    yield Sample("grouped causal", grouped, {"is_causal": True, "key_padding_mask": padding(2, 33)})
    yield Sample("grouped bias", (*grouped, tensor(1, 4, 33, 33, seed=6)))
    yield Sample("grouped decode", decode, {"is_causal": True})
    yield Sample("grouped decode, padding, window", decode, {"key_padding_mask": padding(2, 77).flip(1), "window": 9})
    one = qkv(2, 4, 4, 1, 130, 32)
    yield Sample("one query", one)
    yield Sample("one query, padding, two-sided window", one, {"key_padding_mask": padding(2, 130), "window": 90})
    yield Sample("wide v", qkv(2, 4, 4, 17, 17, 32, 48))
    yield Sample("one head of keys", qkv(2, 4, 1, 17, 17, 80), {"is_causal": True})
    strided = square[0], square[1].contiguous(), tensor(1, 1, 33, 32, seed=7).expand(2, 4, 33, 32)
    yield Sample("strides", strided)
    large = square[0] * 100, square[1] * 100, square[2]
    yield Sample("large scores", large)
    yield Sample("64 wide, grouped causal", qkv(2, 4, 2, 100, 300, 64), {"is_causal": True})
    yield Sample("64 wide, more queries than keys", qkv(1, 2, 2, 140, 70, 64), {"is_causal": True})
    holes = {"key_padding_mask": tensor(2, 150, seed=8) > 0}
    yield Sample("128 wide, padding everywhere", qkv(2, 2, 1, 150, 150, 128), holes)
    yield Sample("128 wide, no real token", qkv(2, 1, 1, 40, 33, 128), {"key_padding_mask": padding(2, 33) & False})
    yield Sample("2x12x128x64", qkv(2, 12, 12, 128, 128, 64), {"key_padding_mask": padding(2, 128)})


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`softmax(q @ k.T * scale + bias, over the keys allowed) @ v`; a query that may attend to no key gives zeros.

    Shapes: q (B, Hq, Lq, D); k (B, Hkv, Lk, D); v (B, Hkv, Lk, Dv); Hq a multiple of Hkv, each key head serving
    Hq / Hkv neighbouring query heads. bias broadcasts to (B, Hq, Lq, Lk): added, or, if bool, True where allowed.
    key_padding_mask (B, Lk), bool or integer: nonzero for a real token. The result is (B, Hq, Lq, Dv), stored as
    (B, Lq, Hq, Dv): its transpose(1, 2) is contiguous.
    Positions: the last query sits at the last key's position. is_causal allows the keys up to the query's position;
    window w those less than w positions away, so with is_causal the query's own and the w - 1 before it.
    scale defaults to D ** -0.5. Dtypes: q, k and v the same floating one, the result's; scores and softmax in float32
    (float64 for float64), the weights rounded to v's dtype.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; grouped heads as in Ainslie et al.,
    arXiv:2305.13245; the window as in Hugging Face's sliding_window.
    """
    dtype = wide(q.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), dtype)
    if mask is not None:
        scores = scores + mask
        nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous().transpose(1, 2)


def _flash_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> list[str]:
    why_not = _attention_cuda.flash_why_not if q.is_cuda else _attention_cpu.flash_why_not
    return why_not(q, k, v, bias, key_padding_mask, is_causal, window, scale)


def _sdpa_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> list[str]:
    if q.is_cuda:
        return _attention_cuda.mask_reasons(q, k, bias)
    return not_on_cpu(q) + (["q or k is empty"] if q.numel() == 0 or k.numel() == 0 else [])


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> list[str]:
    reasons = triton_why_not(q)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    limit = _MAX_HEAD_DIM // 2 if q.dtype == torch.float32 else _MAX_HEAD_DIM
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] > limit:
            reasons.append(f"{name}'s head_dim {tensor.shape[3]} is above {limit}, the kernel's for {q.dtype}")
    return reasons


def _triton_configs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Sequence[Any]:
    from burnish.kernels.attention_configs import configs_for

    return configs_for(q, k, v, bias, key_padding_mask)


attention.impl("torch_flash_float32", why_not=_attention_cpu.flash_float32_why_not)(_attention_cpu.torch_flash_float32)


@attention.impl("torch_flash", why_not=_flash_why_not)
def _torch_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's flash attention, called directly; grouped heads without G copies of k and v."""
    kernel = _attention_cuda.torch_flash if q.is_cuda else _attention_cpu.torch_flash
    return kernel(q, k, v, bias, key_padding_mask, is_causal, window, scale)


@attention.impl("torch_sdpa", why_not=_sdpa_why_not, differentiable=True)
def _torch_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention, which chooses a kernel and has its own backward."""
    masked = bias is not None or key_padding_mask is not None or window is not None or q.shape[2] != k.shape[2]
    mask = nothing = None
    if masked and q.is_cuda:
        mask, nothing = _attention_cuda.safe_mask(q, k, bias, key_padding_mask, is_causal, window)
    elif masked:
        mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal and not masked, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if nothing is not None:
        out = out.masked_fill(nothing, 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


attention.impl("torch_cudnn", why_not=_attention_cuda.cudnn_why_not)(_attention_cuda.torch_cudnn)
attention.impl("torch_efficient", why_not=_attention_cuda.efficient_why_not)(_attention_cuda.torch_efficient)


@attention.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    config: Any = None,
) -> Tensor:
    """A flash attention in Triton that takes every mask, without one in memory."""
    from burnish.kernels.attention import attention_forward

    return attention_forward(q, k, v, bias, key_padding_mask, is_causal, window, scale, config=config)


attention.impl("triton_decode", why_not=_attention_cuda.decode_why_not, configs=_attention_cuda.decode_configs)(
    _attention_cuda.triton_decode
)


def _gluon_configs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Sequence[Any]:
    from burnish.kernels.attention_wgmma import attention_wgmma_configs, useful_split

    return attention_wgmma_configs(q.shape[3], useful_split(q, k))


@attention.impl("gluon", why_not=_attention_cuda.gluon_why_not, configs=_gluon_configs)
def _gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    config: Any = None,
) -> Tensor:
    """A flash attention in Gluon for Hopper, a warp that loads and warps that attend."""
    from burnish.kernels.attention_wgmma import attention_wgmma

    return attention_wgmma(q, k, v, key_padding_mask, is_causal, scale, config=config)
