"""What `attention` and its parts in training share: checks, cost, samples, the shape of the result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample
from burnish.ops._common import check_floating, check_same_dtype, nbytes, wide
from burnish.ops._dropout import check_dropout, kept_weights
from burnish.ops._masks import additive_mask, allowed_pairs, attended_pairs

IN_TRAINING = (
    *("causal", "two-sided window", "left padding, causal", "no real token", "bias", "bias without batch and heads"),
    *("boolean bias, rows of false", "scale", "more queries than keys, causal", "grouped causal", "grouped bias"),
    *("wide v", "one head of keys", "strides", "64 wide, grouped causal", "dropout", "dropout, grouped causal padding"),
)
"""Samples that show every feature, also of the Ops that training calls."""


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
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
    check_dropout(dropout_p, seed)
    if bias is not None:
        _check_bias(bias, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def _check_bias(bias: Tensor, full: tuple[int, ...]) -> None:
    if bias.dtype != torch.bool:
        check_floating("bias", bias)
    sizes = zip(reversed(bias.shape), reversed(full), strict=False)
    if bias.dim() > 4 or any(size != 1 and size != whole for size, whole in sizes):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must broadcast to (B, Hq, Lq, Lk), {tuple(full)}")


def cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Cost:
    batch, heads, length, width = q.shape
    pairs = batch * heads * attended_pairs(length, k.shape[2], is_causal, window)
    out = batch * heads * length * v.shape[3] * q.element_size()
    return Cost(2 * pairs * (width + v.shape[3]), nbytes(q, k, v, bias, key_padding_mask) + out)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
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
    drawn = torch.tensor([1 << 40 | 7], device=device)
    yield Sample("dropout", square, {"dropout_p": 0.2, "seed": drawn})
    half = {"dropout_p": 0.5, "seed": drawn, "is_causal": True, "key_padding_mask": padding(2, 33)}
    yield Sample("dropout, grouped causal padding", grouped, half)
    yield Sample("2x12x128x64", qkv(2, 12, 12, 128, 128, 64), {"key_padding_mask": padding(2, 128)})


def shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def for_queries(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values with each head repeated for the query heads that it serves."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1) if groups > 1 else k


def scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """(B, Hq, Lq, Lk) in float32 (float64 for float64), -inf where a query may not attend."""
    dtype = wide(q.dtype)
    found = (
        q.to(dtype) @ for_queries(k, q).to(dtype).transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    )
    mask = additive_mask(bias, allowed_pairs(q, k, key_padding_mask, is_causal, window), dtype)
    return found if mask is None else found + mask


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of each query, zeros where it may attend to nothing; and True for such queries, (..., Lq, 1)."""
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0), nothing


def dropped(weights: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The weights (B, Hq, Lq, Lk) after dropout."""
    if not dropout_p or seed is None:
        return weights
    batch, heads, lq, lk = weights.shape
    return torch.where(kept_weights(seed, dropout_p, batch, heads, lq, lk), weights / (1 - dropout_p), 0.0)


def weights_and_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weights, before dropout, and the gradients of the scores, (B, Hq, Lq, Lk) both, from what forward left."""
    found = scores(q, k, bias, key_padding_mask, is_causal, window, scale)
    weights = torch.exp(found - logsumexp.unsqueeze(-1))
    dweights = dropped((grad @ for_queries(v, q).transpose(-2, -1)).to(weights.dtype), dropout_p, seed)
    delta = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(dim=-1, keepdim=True)
    return weights, weights * (dweights - delta)


def dropout_reasons(dropout_p: float) -> list[str]:
    """What speaks against a kernel that has no dropout, or one by random numbers of its own."""
    return [f"dropout_p is {dropout_p}; the kernel cannot drop the weights that the seed says"] if dropout_p else []


def heads_last(out: Tensor) -> Tensor:
    """`out` (B, H, L, D) as the Ops store it: (B, L, H, D)."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
