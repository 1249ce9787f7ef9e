"""Attention of new tokens over a key and value cache of which only the first part is filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, nbytes, not_on_cpu, wide
from burnish.ops._triton import triton_why_not
from burnish.ops.attention import attention

MAX_QUERIES = 64
"""Of the Triton kernel, for each key head."""
MAX_HEAD_DIM = 256
"""Of the Triton kernel."""


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> None:
    attention.check(q, k, v, bias, key_padding_mask, True, window, scale)
    if bias is not None:
        check_floating("bias", bias)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be int32 or int64")
    if lengths.dim() > 1 or lengths.numel() not in (1, q.shape[0]):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; it must be one number, or one for each of q's batch"
        )


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> Cost:
    batch, heads, length, width = q.shape
    keys = k.shape[2] if isinstance(lengths, FakeTensor) else min(int(lengths.max()), k.shape[2])
    keys = keys if window is None else min(keys, window + length - 1)
    read = sum(batch * t.shape[1] * keys * t.shape[3] * t.element_size() for t in (k, v))
    if bias is not None:
        read += bias.numel() // bias.shape[-1] * min(keys, bias.shape[-1]) * bias.element_size()
    out = batch * heads * length * v.shape[3] * q.element_size()
    return Cost(2 * batch * heads * length * keys * (width + v.shape[3]), nbytes(q) + read + out)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def cached(b: int, hq: int, hkv: int, lq: int, most: int, d: int, dv: int | None = None) -> tuple[Tensor, ...]:
        return (
            tensor(b, lq, hq, d, seed=0).transpose(1, 2),
            tensor(b, hkv, most, d, seed=1),
            tensor(b, hkv, most, dv or d, seed=2),
        )

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    one, few = cached(2, 8, 2, 1, 300, 32), cached(2, 4, 2, 5, 200, 64)
    left = torch.arange(300, device=device) >= lengths(0, 130)[:, None]
    yield Sample("one token", (*one, lengths(157)))
    yield Sample("the whole cache", (*one, lengths(300)))
    yield Sample("one key", (*one, lengths(1)))
    yield Sample("more than fits", (*one, lengths(1000)))
    yield Sample("a length for each", (*one, lengths(300, 70)))
    yield Sample("left padding", (*one, lengths(200)), {"key_padding_mask": left})
    yield Sample("no real token", (*one, lengths(100)), {"key_padding_mask": left})
    yield Sample("integer padding", (*one, lengths(200)), {"key_padding_mask": left.long()})
    yield Sample("window", (*one, lengths(157, dtype=torch.int32)), {"window": 20})
    yield Sample("several tokens", (*few, lengths(150)))
    yield Sample("several tokens, window, lengths", (*few, lengths(150, 31)), {"window": 9})
    yield Sample("several tokens, the first", (*few, lengths(5)))
    yield Sample("scale", (*one, lengths(64)), {"scale": 1.0})
    by_head = tensor(300, 8, 1, seed=3).permute(1, 2, 0)  # as an embedding of each position leaves it
    yield Sample("bias by head", (*one, lengths(157)), {"bias": by_head[None]})
    yield Sample("bias, left padding", (*one, lengths(200, 41)), {"bias": by_head, "key_padding_mask": left})
    full_bias = {"bias": tensor(2, 4, 5, 200, seed=4).float(), "window": 40, "scale": 1.0}
    yield Sample("several tokens, bias of each", (*few, lengths(150, 31)), full_bias)
    yield Sample("bias of queries", (*few, lengths(150)), {"bias": tensor(5, 1, seed=5)})
    yield Sample("odd sizes", (*cached(1, 3, 1, 2, 77, 40, 24), lengths(76)))
    yield Sample("tokens before heads", (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in one), lengths(157)))
    yield Sample("1x32/8x1024x128", (*cached(1, 32, 8, 1, 1024, 128), lengths(1000)))


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of the newest tokens over the first `lengths` keys of a cache, their own among them.

    Shapes: q (B, Hq, Lq, D); the cache k (B, Hkv, Lmax, D) and v (B, Hkv, Lmax, Dv), Hq a multiple of Hkv; lengths one
    int32 or int64 number, or (B,): how many keys are filled (more than Lmax counts as Lmax); the rest must be finite.
    key_padding_mask (B, Lmax), bool or integer: nonzero for a real token. bias, floating and finite, broadcasts to
    (B, Hq, Lq, Lmax): added to the scaled scores. The result is (B, Hq, Lq, Dv), stored as (B, Lq, Hq, Dv).
    Positions: query i is token lengths - Lq + i, and sees the keys up to its own; window w those less than w positions
    back. A query that sees no key gives zeros. scale defaults to D ** -0.5.
    Dtypes: q, k and v the same floating one, the result's; scores and softmax in float32 (float64 for float64).
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: as `attention`; the cache as in Pope et al., "Efficiently Scaling Transformer Inference", arXiv:2211.05102.
    """
    dtype, groups = wide(q.dtype), q.shape[1] // k.shape[1]
    seen = _seen(q, k, lengths, key_padding_mask, window)
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.to(dtype) @ keys.to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(dtype)
    nothing = ~seen.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~(seen | nothing), -torch.inf), dim=-1).masked_fill(nothing, 0.0)
    return (weights.to(v.dtype) @ values).transpose(1, 2).contiguous().transpose(1, 2)


def _seen(q: Tensor, k: Tensor, lengths: Tensor, key_padding_mask: Tensor | None, window: int | None) -> Tensor:
    """True where the query sees the key, (1 or B, 1, Lq, Lmax)."""
    position = lengths.reshape(-1, 1, 1, 1).clamp(max=k.shape[2]) - q.shape[2]
    position = position + torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    seen: Tensor = key <= position
    if window is not None:
        seen = seen & (key > position - window)
    return seen if key_padding_mask is None else seen & key_padding_mask.to(torch.bool)[:, None, None, :]


def _with_bias(seen: Tensor, bias: Tensor | None) -> Tensor:
    """One mask of both, boolean without a bias."""
    return seen if bias is None else torch.where(seen, bias, -torch.inf)


def _torch_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> list[str]:
    return not_on_cpu(q) + (["an input is empty"] if q.numel() == 0 or k.numel() == 0 or v.numel() == 0 else [])


@cached_attention.impl("torch", why_not=_torch_why_not)
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`attention` over the filled part, whose size a CPU knows."""
    most = max(1, min(int(lengths.max()), k.shape[2]))
    filled = k[:, :, :most], v[:, :, :most]
    bias = None if bias is None else bias[..., :most]
    if int(lengths.min()) >= most >= q.shape[2]:
        real = None if key_padding_mask is None else key_padding_mask[:, :most]
        arguments: tuple[Any, ...] = (q, *filled, bias, real, True, window, scale)
    else:
        mask = _with_bias(_seen(q, k, lengths, key_padding_mask, window)[..., :most], bias)
        arguments = (q, *filled, mask, None, False, None, scale)
    out: Tensor = attention.select(*arguments).fn(*arguments)
    return out


def _torch_masked_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> list[str]:
    return [] if q.is_cuda else [f"the inputs are on {q.device.type}, not on a CUDA device"]


@cached_attention.impl("torch_masked", why_not=_torch_masked_why_not)
def _torch_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention over the whole cache with a mask."""
    seen = _seen(q, k, lengths, key_padding_mask, window)
    nothing = ~seen.any(dim=-1, keepdim=True)
    mask = _with_bias(seen | nothing, None if bias is None else bias.to(q.dtype))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.masked_fill(nothing, 0.0).transpose(1, 2).contiguous().transpose(1, 2)


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> list[str]:
    reasons = triton_why_not(q)
    if k.numel() == 0 or v.numel() == 0:
        reasons.append("k or v is empty")
    queries = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    if queries > MAX_QUERIES:
        reasons.append(f"{queries} queries share a key head; the kernel takes {MAX_QUERIES}")
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(q.shape[3], v.shape[3])} is above {MAX_HEAD_DIM}")
    return reasons


def _triton_configs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None,
) -> Sequence[Any]:
    from burnish.kernels.decode_attention import decode_configs

    return decode_configs(q, k, v)


@cached_attention.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """A Triton kernel that reads the filled part (a small cache whole), split among programs."""
    from burnish.kernels.decode_attention import decode_attention

    return decode_attention(q, k, v, lengths, key_padding_mask, window, scale, bias, config=config)
