"""Arguments of each Op: random tensors of given sizes, on the CPU, in the dtype that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.numerics import randn
from burnish.ops import attention_with_logsumexp, varlen_attention_with_logsumexp
from burnish.quantize import Kind, quantize_weight

Arguments = tuple[Any, ...]
Maker = Callable[[torch.dtype], Arguments]


def tensors(*shapes: tuple[int, ...]) -> Maker:
    return lambda dtype: tuple(randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))


def norm_backward_arguments(*shape: int, bias: bool) -> Maker:
    """Gradient and x of that shape, weight, and a bias for layer norm."""

    def arguments(dtype: torch.dtype) -> Arguments:
        grad, x, *vectors = tensors(shape, shape, *((shape[-1],),) * (2 if bias else 1))(dtype)
        return grad, x, *vectors, 1e-5

    return arguments


def embedding_backward_arguments(tokens: int, width: int, entries: int, tied: bool = False) -> Maker:
    """`tied`: with the gradient of a product that shares the table, and its factor."""

    def arguments(dtype: torch.dtype) -> Arguments:
        generator = torch.Generator().manual_seed(0)
        grad, table_grad = tensors((1, tokens, width), (entries if tied else 0, width))(dtype)
        ids = torch.randint(entries, (1, tokens), generator=generator)
        return grad, ids, entries, *((table_grad, torch.tensor(0.5)) if tied else ())

    return arguments


def sum_over_ranks(rows: int, n: int, dtype: torch.dtype) -> Arguments:
    """A branch's end without a bias, of a process by itself."""
    x, residual, weight = tensors((1, rows, n), (1, rows, n), (n,))(dtype)
    return x, None, residual, weight, 1e-6


def branch_end(rows: int, k: int, n: int, dtype: torch.dtype) -> Arguments:
    x, weight, residual, scale = tensors((1, rows, k), (n, k), (1, rows, n), (n,))(dtype)
    return x, weight, None, residual, scale


def linear_arguments(rows: int, k: int, n: int, activation: str = "none", residual: bool = False) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, bias, other = tensors((1, rows, k), (n, k), (n,), (1, rows, n))(dtype)
        return x, weight * k**-0.5, bias, activation, other if residual else None

    return arguments


def gated_mlp_arguments(rows: int, width: int, inner: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, gate_up, down = tensors((1, rows, width), (2 * inner, width), (width, inner))(dtype)
        return x, gate_up * width**-0.5, down * inner**-0.5

    return arguments


def quantized_arguments(rows: int, k: int, n: int, kind: Kind) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *_ = linear_arguments(rows, k, n)(dtype)
        quantized = quantize_weight(weight, kind)
        return x, quantized.data, quantized.scales, quantized.zeros, kind

    return arguments


def norm_linear_arguments(rows: int, k: int, n: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *_ = linear_arguments(rows, k, n)(dtype)
        return x, *tensors((k,))(dtype), 1e-6, weight

    return arguments


def norm_gated_mlp_arguments(rows: int, width: int, inner: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, *weights = gated_mlp_arguments(rows, width, inner)(dtype)
        return x, *tensors((width,))(dtype), 1e-6, *weights

    return arguments


def rope_arguments(heads: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        angles = torch.arange(seq)[:, None] / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.cat((angles, angles), dim=-1)
        return randn(1, heads, seq, head_dim, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)

    return arguments


def rope_qk_arguments(heads: int, key_heads: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        q, *tables = rope_arguments(heads, seq, head_dim)(dtype)
        return (q, rope_arguments(key_heads, seq, head_dim)(dtype)[0], *tables)

    return arguments


def rope_tables_arguments(first: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        inv_freq = 500_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        return torch.arange(first, first + seq)[None], inv_freq, str(dtype)[6:]

    return arguments


def append_kv_arguments(heads: int, most: int, length: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        cache, new = (1, heads, most, head_dim), (1, heads, seq, head_dim)
        return *tensors(cache, cache, new, new)(dtype), torch.tensor(length)

    return arguments


def rope_append_arguments(heads: int, key_heads: int, most: int, length: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        q, k, *tables = rope_qk_arguments(heads, key_heads, seq, head_dim)(dtype)
        k_cache, v_cache, _, v, lengths = append_kv_arguments(key_heads, most, length, seq, head_dim)(dtype)
        return q, k, v, *tables, k_cache, v_cache, lengths

    return arguments


def linear_rope_arguments(rows: int, width: int, heads: int, key_heads: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        rotated = (heads + key_heads) * head_dim
        x, weight, *_ = linear_arguments(rows, width, rotated + key_heads * head_dim)(dtype)
        _, *tables = rope_arguments(1, rows, head_dim)(dtype)
        return x, weight, None, *tables, head_dim, rotated

    return arguments


def linear_rope_append_arguments(
    width: int, heads: int, key_heads: int, most: int, length: int, d: int, rotated: bool = True
) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, bias, *_ = linear_arguments(1, width, (heads + 2 * key_heads) * d)(dtype)
        _, _, _, cos, sin, *caches = rope_append_arguments(heads, key_heads, most, length, 1, d)(dtype)
        return (x, weight, None, cos, sin, *caches) if rotated else (x, weight, bias, None, None, *caches)

    return arguments


def quantized_linear_rope_append_arguments(
    width: int, heads: int, key_heads: int, most: int, length: int, d: int, kind: Kind
) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *rest = linear_rope_append_arguments(width, heads, key_heads, most, length, d)(dtype)
        quantized = quantize_weight(weight, kind)
        return x, quantized.data, quantized.scales, quantized.zeros, kind, *rest

    return arguments


def attention_arguments(
    batch: int, heads: int, kv_heads: int, seq: int, head_dim: int, padded: bool = False, causal: bool = False
) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        shapes = ((batch, seq, h, head_dim) for h in (heads, kv_heads, kv_heads))
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors(*shapes)(dtype))  # stored as projections leave them
        mask = torch.arange(seq) < torch.linspace(seq // 2, seq, batch).long()[:, None]
        return q, k, v, None, mask if padded else None, causal

    return arguments


def varlen_arguments(heads: int, kv_heads: int, tokens: int, head_dim: int, training: bool = False) -> Maker:
    """Causal sequences of a sixteenth to a half of the tokens; with what the backward pass wants besides."""

    def arguments(dtype: torch.dtype) -> Arguments:
        q, k, v = tensors(*((tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)))(dtype)
        ends = torch.tensor([1, 3, 5, 8, 16]) * tokens // 16
        offsets = torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])
        rest = (offsets, None, int(offsets.diff().max()), None, True)
        if not training:
            return q, k, v, *rest
        with torch.no_grad():  # exact: eager, which has results of its own, is to find the same gradients
            out, logsumexp = varlen_attention_with_logsumexp(q.double(), k.double(), v.double(), *rest)
        grad = randn(tokens, heads, head_dim, dtype=dtype, seed=9)
        return grad, q, k, v, out.to(dtype), logsumexp.to(torch.promote_types(dtype, torch.float32)), *rest

    return arguments


def attention_backward_arguments(
    batch: int, heads: int, kv_heads: int, seq: int, head_dim: int, causal: bool = False
) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        args = attention_arguments(batch, heads, kv_heads, seq, head_dim, causal=causal)(dtype)
        q, k, v, *rest = args
        with torch.no_grad():  # exact: eager, which has results of its own, is to find the same gradients
            out, logsumexp = attention_with_logsumexp(q.double(), k.double(), v.double(), *rest)
        return (
            *tensors(tuple(out.shape))(dtype),
            q,
            k,
            v,
            out.to(dtype),
            logsumexp.to(torch.promote_types(dtype, torch.float32)),
            *rest,
        )

    return arguments


def cached_attention_arguments(batch: int, heads: int, kv_heads: int, most: int, length: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        cache = (batch, kv_heads, most, head_dim)
        return *tensors((batch, heads, 1, head_dim), cache, cache)(dtype), torch.tensor(length)

    return arguments


def token_arguments(batch: int, width: int, positions: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        ids = torch.randint(32_000, (batch, 1), generator=torch.Generator().manual_seed(0))
        if not positions:
            return ids, *tensors((32_000, width))(dtype), None, None
        word, position = tensors((32_000, width), (positions, width))(dtype)
        return ids, word, torch.tensor([[positions // 2]]), position

    return arguments


def embedding_arguments(batch: int, seq: int, width: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        ids = torch.randint(30_522, (batch, seq), generator=torch.Generator().manual_seed(0))
        tables = tensors((30_522, width), (512, width), (2, width), (width,), (width,))(dtype)
        word, position, kind, weight, bias = tables
        return ids, word, torch.arange(seq)[None], position, torch.zeros_like(ids), kind, weight, bias, 1e-12

    return arguments


def sample_arguments(rows: int, size: int, top_k: int, top_p: float, do_sample: bool) -> Maker:
    """One token stands out, so that every generator draws it; the time depends on no logit."""

    def arguments(dtype: torch.dtype) -> Arguments:
        (logits,) = tensors((rows, size))(dtype)
        logits[:, size // 3] = 200.0
        return logits, torch.tensor(0), torch.tensor(1), 0.8, top_k, top_p, 0.0, do_sample

    return arguments


def penalize_arguments(rows: int, size: int, length: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        tokens = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
        return *tensors((rows, size))(dtype), tokens, torch.tensor(length), 1.2

    return arguments


def cross_entropy_arguments(rows: int, size: int) -> Maker:
    """Logits, and classes of which one in 16 is ignored."""

    def arguments(dtype: torch.dtype) -> Arguments:
        return randn(rows, size, dtype=dtype), classes(rows, size)

    return arguments


def linear_cross_entropy_arguments(rows: int, k: int, size: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight = tensors((rows, k), (size, k))(dtype)
        return x, weight * k**-0.5, classes(rows, size)

    return arguments


def scale_arguments(*shape: int) -> Maker:
    return lambda dtype: (randn(*shape, dtype=dtype), torch.tensor(0.5))


def classes(rows: int, size: int) -> torch.Tensor:
    """Of which one in 16 is ignored."""
    found = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(0))
    found[15::16] = -100
    return found
