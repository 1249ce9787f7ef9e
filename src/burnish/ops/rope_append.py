"""Rotary position embedding of queries and keys, and the keys and values written behind those of a cache, in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes
from burnish.ops.append_kv import append_kv
from burnish.ops.rope import rope, rope_tables
from burnish.ops.rope_qk import rope_qk


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> None:
    rope_qk.check(q, k, cos, sin, interleaved)
    append_kv.check(k_cache, v_cache, k, v, lengths)


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> Cost:
    return rope_qk.cost(q, k, cos, sin, interleaved) + Cost(0, 2 * nbytes(v) + nbytes(lengths))


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

    one, one_caches = of(2, 6, 2, 1, 40, 32)
    few, few_caches = of(2, 6, 2, 7, 40, 32)
    each = [torch.stack(pair) for pair in zip(tables(7, 32, 33), tables(7, 32, 2), strict=True)]
    odd, odd_caches = of(2, 3, 1, 5, 17, 24, 20)
    yield Sample("odd", (*odd, *tables(5, 20, 4), *odd_caches, lengths(4)))
    apart = [[t.transpose(1, 2).contiguous().transpose(1, 2) for t in ts] for ts in (few, few_caches)]
    yield Sample("transposed", (*apart[0], *tables(7, 32), *apart[1], lengths(0)))
    yield Sample("heads first in memory", (*(t.contiguous() for t in few), *tables(7, 32), *few_caches, lengths(0)))
    yield Sample("one token", (*one, *tables(1, 32, 11), *one_caches, torch.tensor(11, device=device)))
    yield Sample("interleaved", (*few, *tables(7, 32, 9, True), *few_caches, lengths(9), True))
    yield Sample("partial interleaved", (*few, *tables(7, 20, 9, True), *few_caches, lengths(9), True))
    yield Sample("table and length for each", (*few, *each, *few_caches, lengths(33, 2)))
    tables32 = (t[None].float() for t in tables(7, 32, 36))
    yield Sample("float32 tables, not all fit", (*few, *tables32, *few_caches, lengths(36, 40, dtype=torch.int32)))
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
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"k_cache": 1, "v_cache": 2})
def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` of q, and `append_kv` of the rotated k and of v: `(q, k_cache, v_cache)`.

    Shapes: q (B, H, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); cos and sin as `rope` takes them, of the new tokens'
    positions; k_cache (B, Hkv, Lmax, D), v_cache (B, Hkv, Lmax, Dv) and lengths as `append_kv` takes them. Each result
    is laid out in memory as torch.empty_like of its input.
    Positions: token i goes to position lengths + i of the caches; what would lie past Lmax is dropped.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: q, k, v and the caches the same floating one; otherwise as in `rope`.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: Su et al., "RoFormer", arXiv:2104.09864; the cache as in Pope et al., "Efficiently Scaling Transformer
    Inference", arXiv:2211.05102.
    """
    rotated_q, rotated_k = rope_qk.reference(q, k, cos, sin, interleaved)
    return rotated_q, *append_kv.reference(k_cache, v_cache, rotated_k, v, lengths)


def _torch_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> list[str]:
    return [
        *rope_qk.impls["torch"].why_not(q, k, cos, sin, interleaved),
        *append_kv.impls["torch"].why_not(k_cache, v_cache, k, v, lengths),
    ]


def _torch_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rotated_q, rotated_k = rope_qk.impls["torch"].fn(q, k, cos, sin, interleaved)
    append = append_kv.impls["torch"].in_place
    assert append is not None
    return rotated_q, *append(k_cache, v_cache, rotated_k, v, lengths)


@rope_append.impl("torch", why_not=_torch_why_not, in_place=_torch_in_place)
def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_qk` and `append_kv` by PyTorch's own functions."""
    return _torch_in_place(q, k, v, cos, sin, k_cache.clone(), v_cache.clone(), lengths, interleaved)


def _triton_why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> list[str]:
    reasons = [
        *rope.impls["triton"].why_not(q, cos, sin, interleaved),
        *append_kv.impls["triton"].why_not(k_cache, v_cache, k, v, lengths),
    ]
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
    interleaved: bool,
) -> list[Any]:
    from burnish.kernels.append import append_configs

    return append_configs(q, k, v)


def _triton_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from burnish.kernels.append import rope_append as rotate_and_append

    return rotate_and_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, config), k_cache, v_cache


@rope_append.impl("triton", why_not=_triton_why_not, configs=_triton_configs, in_place=_triton_in_place)
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch for all three; the lengths stay on the device."""
    caches = k_cache.clone(), v_cache.clone()
    return _triton_in_place(q, k, v, cos, sin, *caches, lengths, interleaved, config=config)
