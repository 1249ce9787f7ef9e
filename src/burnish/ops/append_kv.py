"""New keys and values written behind those that a cache of fixed size holds already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, check_same_dtype, nbytes
from burnish.ops._triton import triton_why_not

_MAX_HEAD_DIM = 256  # of the Triton kernel


def _check(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    check_floating("k", k)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_same_dtype(name, tensor, "k", k)
    if k.dim() != 4:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must be (batch, heads, new tokens, head_dim)")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; for k of {tuple(k.shape)} only its head_dim may differ")
    for name, cache, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        if cache.dim() != 4 or cache.shape[:2] != new.shape[:2] or cache.shape[3] != new.shape[3]:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}; "
                f"for new ones of {tuple(new.shape)} only its number of positions may differ"
            )
    if v_cache.shape[2] != k_cache.shape[2]:
        raise ValueError(f"v_cache has {v_cache.shape[2]} positions where k_cache has {k_cache.shape[2]}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths has dtype {lengths.dtype}; it must be int32 or int64")
    if lengths.dim() > 1 or lengths.numel() not in (1, k.shape[0]):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; it must be one number, or one for each of k's batch"
        )


def _cost(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Cost:
    # Nothing is computed; an entry that moves counts as one operation, so that there is a cost at all.
    return Cost(k.numel() + v.numel(), 2 * nbytes(k, v) + nbytes(lengths))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def of(b: int, h: int, s: int, most: int, d: int, dv: int | None = None) -> tuple[Tensor, ...]:
        """The caches, and k and v as they lie in one product with q."""
        dv = dv or d
        product = tensor(b, s, h * (2 * d + dv), seed=2)
        k, v = product[..., h * d : 2 * h * d].unflatten(-1, (h, d)), product[..., 2 * h * d :].unflatten(-1, (h, dv))
        return tensor(b, h, most, d, seed=0), tensor(b, h, most, dv, seed=1), k.transpose(1, 2), v.transpose(1, 2)

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    one, few = of(2, 3, 1, 40, 32), of(2, 3, 7, 40, 32)
    yield Sample("odd", (*of(2, 3, 5, 17, 20, 12), lengths(4)))
    yield Sample("transposed", (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in few), lengths(0)))
    yield Sample("one token", (*one, torch.tensor(11, device=device)))
    yield Sample("one token, a length for each", (*one, lengths(39, 0, dtype=torch.int32)))
    yield Sample("several tokens, a length for each", (*few, lengths(33, 2)))
    yield Sample("not all fit", (*few, lengths(36, 39)))
    yield Sample("none fits", (*few, lengths(40, 1000, dtype=torch.int32)))
    yield Sample("more than the cache holds", (*of(1, 2, 9, 6, 16), lengths(0)))
    yield Sample("1x8x1024x128", (*of(1, 8, 1, 1024, 128), lengths(1000)))


def _shape(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k_cache), torch.empty_like(v_cache)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"k_cache": 0, "v_cache": 1})
def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The caches with k and v at the positions from `lengths` on: `(k_cache, v_cache)`.

    Shapes: k (B, Hkv, S, D) and v (B, Hkv, S, Dv); the caches k_cache (B, Hkv, Lmax, D) and v_cache (B, Hkv, Lmax, Dv);
    lengths one int32 or int64 number, or (B,): how many positions, at least 0, were filled before. Each result is laid
    out in memory as torch.empty_like of its cache.
    Positions: token i goes to position lengths + i; what would lie past Lmax is dropped, which nobody can be told of
    without waiting for the device: ask before.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: k, v and the caches the same floating one.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: the cache as in Pope et al., "Efficiently Scaling Transformer Inference", arXiv:2211.05102.
    """
    return _appended(k_cache, k, lengths), _appended(v_cache, v, lengths)


def _appended(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Every row of the result is one of the cache's or one of the new ones."""
    position = torch.arange(cache.shape[2], device=cache.device)
    token = position - lengths.reshape(-1, 1)
    row = torch.where((token >= 0) & (token < new.shape[2]), cache.shape[2] + token, position)
    rows = torch.cat((cache, new), dim=2)
    return torch.empty_like(cache).copy_(rows.gather(2, row[:, None, :, None].expand(cache.shape)))


def _empty(*tensors: Tensor) -> list[str]:
    return ["an input is empty"] if any(t.numel() == 0 for t in tensors) else []


def _torch_why_not(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> list[str]:
    return _empty(k_cache, v_cache, k, v)


def _torch_in_place(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    for cache, new in ((k_cache, k), (v_cache, v)):
        (append_by_slices if cache.device.type == "cpu" else append_by_index)(cache, new, lengths)
    return k_cache, v_cache


def append_by_slices(cache: Tensor, new: Tensor, lengths: Tensor) -> None:
    """Where the lengths can be asked for without waiting."""
    starts = lengths.reshape(-1).tolist()
    for start, rows, tokens in zip(starts, cache.chunk(len(starts)), new.chunk(len(starts)), strict=True):
        to = rows[:, :, start : start + tokens.shape[2]]
        to.copy_(tokens[:, :, : to.shape[2]])


def append_by_index(cache: Tensor, new: Tensor, lengths: Tensor) -> None:
    """Without a look at the lengths. The tokens that are dropped all write to the last position what belongs there: the
    token that comes there, or what was there before."""
    last, start = cache.shape[2] - 1, lengths.reshape(-1, 1)
    position = (start + torch.arange(new.shape[2], device=new.device)).clamp(max=last)
    token = (position - start).clamp(min=0)
    position, token, fits = (t[:, None, :, None] for t in (position, token, (start <= last).expand_as(token)))
    rows = torch.where(fits, new.gather(2, token.expand(new.shape)), cache.gather(2, position.expand(new.shape)))
    cache.scatter_(2, position.expand(new.shape), rows)


@append_kv.impl("torch", why_not=_torch_why_not, in_place=_torch_in_place)
def _torch(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Slices on a CPU, which knows the lengths; elsewhere an index that is computed on the device."""
    return _torch_in_place(k_cache.clone(), v_cache.clone(), k, v, lengths)


def _triton_why_not(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> list[str]:
    reasons = list(dict.fromkeys(triton_why_not(k) + _empty(k_cache, v_cache, v)))
    if max(k.shape[3], v.shape[3]) > _MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(k.shape[3], v.shape[3])} is above {_MAX_HEAD_DIM}")
    return reasons


def _triton_configs(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> list[Any]:
    from burnish.kernels.append import append_configs

    return append_configs(None, k, v)


def _triton_in_place(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, config: Any = None
) -> tuple[Tensor, Tensor]:
    from burnish.kernels.append import append

    append(k_cache, v_cache, k, v, lengths, config)
    return k_cache, v_cache


@append_kv.impl("triton", why_not=_triton_why_not, configs=_triton_configs, in_place=_triton_in_place)
def _triton(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, config: Any = None
) -> tuple[Tensor, Tensor]:
    """One launch for both; the lengths stay on the device."""
    return _triton_in_place(k_cache.clone(), v_cache.clone(), k, v, lengths, config=config)
