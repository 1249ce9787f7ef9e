"""The inputs of the Ops on packed sequences: checks, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from burnish.numerics import randn
from burnish.op import Sample
from burnish.ops._common import check_floating, check_same_dtype


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        check_same_dtype(name, tensor, "q", q)
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (tokens, heads, head_dim)")
    if k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; for q of {tuple(q.shape)} it must have its head_dim, and a number of heads "
            "that divides q's"
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be k's {tuple(k.shape)} up to the last dimension")
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has {k.shape[0]} tokens where q has {q.shape[0]}; cu_seqlens_k is needed")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets is None:
            continue
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {offsets.dtype}; it must be int32 or int64")
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"{name} has shape {tuple(offsets.shape)}; it must be (sequences + 1,): where each starts, and the end"
            )
        if offsets.device != q.device:
            raise ValueError(f"{name} is on {offsets.device}, q on {q.device}")
        if name == "cu_seqlens_k" and offsets.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"cu_seqlens_k has shape {tuple(offsets.shape)} where cu_seqlens_q has {tuple(cu_seqlens_q.shape)}"
            )
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if most is not None and most < 0:
            raise ValueError(f"{name} is {most}; it must be at least 0, or None")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if q.device.type == "cpu" and not isinstance(cu_seqlens_q, FakeTensor):
        _check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        if cu_seqlens_k is not None:
            _check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def _check_offsets(name: str, offsets: Tensor, tokens: int, most: int | None) -> None:
    """On the CPU, where to look at them costs a microsecond."""
    starts = offsets.tolist()
    if starts[0] != 0 or starts[-1] != tokens or any(b < a for a, b in pairwise(starts)):
        raise ValueError(f"{name} is {_shortened(starts)}; it must rise from 0 to the number of tokens, {tokens}")
    if most is not None and (longest := max((b - a for a, b in pairwise(starts)), default=0)) > most:
        raise ValueError(f"max_{name.removeprefix('cu_').replace('seqlens', 'seqlen')} is {most}; there are {longest}")


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Of `varlen_attention`; those of the passes for training are made of them."""

    def qkv(tokens: int, keys: int, hq: int, hkv: int, d: int, dv: int | None = None) -> tuple[Tensor, ...]:
        shapes = (tokens, hq, d), (keys, hkv, d), (keys, hkv, dv or d)
        return tuple(randn(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes))

    def offsets(*lengths: int, of: torch.dtype = torch.int32) -> Tensor:
        starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        return starts.to(device, of)

    lengths = (5, 33, 0, 1, 17)
    square, cu = qkv(56, 56, 4, 4, 32), offsets(*lengths)
    # As one projection leaves them: q, k and v of a token next to each other.
    joined = randn(56, 3, 4, 16, dtype=dtype, device=device, seed=3).unbind(1)
    grouped, keys = qkv(56, 71, 4, 2, 16), offsets(9, 40, 3, 0, 19, of=torch.int64)
    yield Sample("full", (*square, cu), {"max_seqlen_q": 33, "max_seqlen_k": 33})
    yield Sample("causal", (*square, cu), {"max_seqlen_q": 33, "max_seqlen_k": 33, "is_causal": True})
    yield Sample("int64 offsets, bounds unknown", (*square, offsets(*lengths, of=torch.int64)))
    yield Sample("bounds larger than any length", (*square, cu), {"max_seqlen_q": 200, "max_seqlen_k": 200})
    yield Sample("window", (*square, cu), {"is_causal": True, "window": 5, "max_seqlen_q": 33, "max_seqlen_k": 33})
    yield Sample("two-sided window", (*square, cu), {"window": 4})
    yield Sample("scale", (*square, cu), {"scale": 1.0})
    yield Sample("one projection", (*joined, cu), {"max_seqlen_q": 33})
    yield Sample("grouped", (*qkv(56, 56, 4, 2, 64), cu), {"is_causal": True, "max_seqlen_q": 33})
    yield Sample("grouped, other keys", (*grouped, offsets(*lengths, of=torch.int64), keys), {"max_seqlen_q": 33})
    yield Sample(
        "grouped, other keys, causal",
        (*grouped, offsets(*lengths, of=torch.int64), keys, 33, 40),
        {"is_causal": True},
    )
    yield Sample("other keys, window", (*grouped, offsets(*lengths), keys.int(), 33, 40), {"window": 7})
    yield Sample("wide v", (*qkv(56, 56, 2, 1, 32, 48), cu), {"max_seqlen_q": 33})
    yield Sample("one long sequence", (*qkv(150, 150, 2, 2, 64), offsets(150)), {"is_causal": True})
    yield Sample("many short ones", (*qkv(40, 40, 2, 2, 16), offsets(*(1 + i % 4 for i in range(16)))), {})
    yield Sample("large scores", (square[0] * 100, square[1] * 100, square[2], cu), {"max_seqlen_q": 33})
    yield Sample("128 wide", (*qkv(200, 200, 2, 1, 128), offsets(70, 130)), {"max_seqlen_q": 130})
