"""Rotary position embedding, a cache appended to, and attention over it: what a layer does between its products when a
model decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes
from burnish.ops.append_kv import append_kv
from burnish.ops.cached_attention import cached_attention
from burnish.ops.rope import rope, rope_tables
from burnish.ops.rope_append import rope_append


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> None:
    rope_append.check(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
    cached_attention.check(q, k_cache, v_cache, lengths, key_padding_mask, window, scale)


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> Cost:
    appended = rope_append.cost(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
    total = lengths + q.shape[2]
    attended = cached_attention.cost(q, k_cache, v_cache, total, key_padding_mask, window, scale)
    return appended + attended + Cost(0, -2 * nbytes(q))  # once rotated, q is neither written nor read


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def of(b: int, hq: int, h: int, s: int, most: int, d: int, dv: int | None = None) -> tuple[tuple[Tensor, ...], ...]:
        """q, k and v as they lie in one product, and the caches."""
        sizes = [(hq, d), (h, d), (h, dv or d)]
        product = randn(b, s, sum(n * w for n, w in sizes), dtype=dtype, device=device, seed=0)
        parts = product.split([n * w for n, w in sizes], dim=-1)
        caches = (randn(b, h, most, w, dtype=dtype, device=device, seed=w) for w in (d, dv or d))
        return tuple(p.unflatten(-1, size).transpose(1, 2) for p, size in zip(parts, sizes, strict=True)), (*caches,)

    def tables(length: int, width: int, offset: int = 0, interleaved: bool = False) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, interleaved))

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    one, caches = of(2, 8, 2, 1, 300, 32)
    few, few_caches = of(2, 6, 2, 5, 40, 32)
    odd, odd_caches = of(1, 3, 1, 1, 77, 40, 24)
    turn = tables(1, 32, 157)
    each = [torch.stack(pair) for pair in zip(tables(1, 32, 299), tables(1, 32, 70), strict=True)]
    left = torch.arange(300, device=device) >= lengths(0, 130)[:, None]
    yield Sample("one token", (*one, *turn, *caches, torch.tensor(157, device=device)))
    yield Sample("the first token", (*one, *tables(1, 32), *caches, lengths(0)))
    yield Sample("the last one that fits", (*one, *turn, *caches, lengths(299, dtype=torch.int32)))
    yield Sample("none fits", (*one, *turn, *caches, lengths(300, 1000)))
    yield Sample("table and length for each", (*one, *each, *caches, lengths(299, 70)))
    yield Sample("left padding", (*one, *turn, *caches, lengths(200)), {"key_padding_mask": left})
    yield Sample("no real token", (*one, *turn, *caches, lengths(100)), {"key_padding_mask": left.long()})
    yield Sample("window", (*one, *turn, *caches, lengths(157, 3)), {"window": 20})
    tables32 = (t[None].float() for t in tables(1, 20, 64))
    yield Sample("part, scale, float32 tables", (*one, *tables32, *caches, lengths(64)), {"scale": 1.0})
    yield Sample("interleaved", (*one, *tables(1, 32, 157, True), *caches, lengths(157)), {"interleaved": True})
    yield Sample("odd sizes", (*odd, *tables(1, 20, 76), *odd_caches, lengths(76)))
    apart = [[t.transpose(1, 2).contiguous().transpose(1, 2) for t in ts] for ts in (one, caches)]
    yield Sample("tokens before heads", (*apart[0], *turn, *apart[1], lengths(157)))
    several = {"window": 9, "key_padding_mask": left[:, 100:140]}
    yield Sample("several tokens", (*few, *tables(5, 32, 30), *few_caches, lengths(33, 36)), several)
    large, large_caches = of(1, 32, 8, 1, 1024, 128)
    yield Sample("1x32/8x1024x128", (*large, *tables(1, 128, 1000), *large_caches, lengths(1000)))


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = cached_attention.shape(q, k_cache, v_cache, lengths, key_padding_mask, window, scale, None)
    return out, torch.empty_like(k_cache), torch.empty_like(v_cache)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"k_cache": 1, "v_cache": 2})
def rope_append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_append`, and `cached_attention` of the rotated q over the caches then: `(attended, k_cache, v_cache)`.

    Shapes: q (B, Hq, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), cos, sin, k_cache (B, Hkv, Lmax, D), v_cache (B, Hkv,
    Lmax, Dv) and lengths, how many positions were filled before, as `rope_append` takes them; key_padding_mask
    (B, Lmax), window and scale as `cached_attention` does. The first result is (B, Hq, S, Dv), stored as
    (B, S, Hq, Dv); the others are laid out in memory as torch.empty_like of their caches.
    Positions: token i goes to position lengths + i of the caches, and what would lie past Lmax is dropped; the queries
    are the last S of the min(lengths + S, Lmax) tokens that are filled then, and see the keys up to their own.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: q, k, v and the caches the same floating one; otherwise as in `rope` and `cached_attention`.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: as of `rope_append` and `cached_attention`.
    """
    turned, *caches = rope_append.reference(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
    attended = cached_attention.reference(turned, *caches, lengths + q.shape[2], key_padding_mask, window, scale)
    return attended, *caches


def _torch_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> list[str]:
    reasons = [
        *rope_append.impls["torch"].why_not(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved),
        *(["an input is empty"] if q.numel() == 0 else []),
    ]
    return list(dict.fromkeys(reasons))


def _torch_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    append = rope_append.impls["torch"].in_place
    assert append is not None
    turned, *_ = append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
    attend = cached_attention.impls["torch" if q.device.type == "cpu" else "torch_masked"].fn
    total = lengths + q.shape[2]
    return attend(turned, k_cache, v_cache, total, key_padding_mask, window, scale), k_cache, v_cache


@rope_append_attention.impl("torch", why_not=_torch_why_not, in_place=_torch_in_place)
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both Ops by PyTorch's own functions."""
    caches = k_cache.clone(), v_cache.clone()
    return _torch_in_place(q, k, v, cos, sin, *caches, lengths, key_padding_mask, window, scale, interleaved)


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> list[str]:
    reasons = [
        *([f"there are {q.shape[2]} new tokens; the kernel takes one"] if q.shape[2] != 1 else []),
        *rope.impls["triton"].why_not(q, cos, sin, interleaved),
        *append_kv.impls["triton"].why_not(k_cache, v_cache, k, v, lengths),
        *cached_attention.impls["triton"].why_not(q[:, :, :1], k_cache, v_cache, lengths, None, window, scale),
    ]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1 and cache.shape[3] != 1:
            reasons.append(f"the last dimension of {name} has a stride of {cache.stride(3)}; the kernel writes rows")
    return list(dict.fromkeys(reasons))


def _triton_configs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    interleaved: bool,
) -> Sequence[Any]:
    from burnish.kernels.append_attention import append_attention_configs

    return append_attention_configs(q, k_cache, v_cache)


def _triton_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from burnish.kernels.append_attention import append_attention

    attended = append_attention(
        q, k, v, cos, sin, k_cache, v_cache, lengths, key_padding_mask, window, scale, interleaved, config
    )
    return attended, k_cache, v_cache


@rope_append_attention.impl("triton", why_not=_triton_why_not, configs=_triton_configs, in_place=_triton_in_place)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for one new token; the new key and value are attended to from registers."""
    caches = k_cache.clone(), v_cache.clone()
    return _triton_in_place(
        q, k, v, cos, sin, *caches, lengths, key_padding_mask, window, scale, interleaved, config=config
    )
