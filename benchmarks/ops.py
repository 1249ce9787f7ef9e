"""Group `ops`: every Impl of every Op at realistic sizes, against eager PyTorch and torch.compile.

"eager" is how a model spells the Op with PyTorch's own functions (not the Op's reference, which computes in float32 and
would be an easy peer to beat); "torch.compile" is the same, compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import burnish.ops  # noqa: F401  (registers the Ops)
from benchmarks import gpu_ops
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.hardware import device
from burnish.numerics import randn
from burnish.op import OPS, Op
from burnish.quantize import Kind, dequantize, quantize_weight

Arguments = tuple[Any, ...]
Maker = Callable[[torch.dtype], Arguments]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    if torch.cuda.is_available():
        yield from gpu_ops.cases()
        return
    for name, (peer, sizes) in BENCHED.items():
        for size, arguments in sizes.items():
            for short, dtype in DTYPES.items():
                case = f"{name} {size} {short}"
                yield Case(case, partial(_run, name=case, op=OPS[name], peer=peer, arguments=arguments, dtype=dtype))


@torch.no_grad()
def _run(
    session: Session,
    *,
    name: str,
    op: Op,
    peer: Callable[..., object],
    arguments: Maker,
    dtype: torch.dtype,
) -> list[Record]:
    torch.compiler.reset()
    bound = op.bind(*arguments(dtype))
    variants: dict[str, Callable[..., object]] = {"eager": peer, "torch.compile": torch.compile(peer)}
    impls = {n: impl.fn for n, impl in op.impls.items() if n != "reference" and not impl.why_not(*bound)}
    outputs = {n: fn(*bound) for n, fn in impls.items()}
    truth = numerics.oracle(op.reference, *bound)
    wrong = {n: reason for n, reason in verdicts(outputs, op.reference(*bound), truth).items() if reason}
    if wrong:
        raise CheckError("; ".join(f"{n}: {reason}" for n, reason in wrong.items()))
    result = session.time(variants | impls, bound)
    session.console.print(result)
    cost = op.cost(*bound)
    floor = device().floor_us(cost.flops, cost.bytes, dtype)
    return result.records(name, session.command(name), floor_us=floor)


# How a model spells each Op, at sizes of BERT-base (width 768), MiniLM (384) and a Llama of width 1024 ----------------


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total if keep_sum else total.new_empty(0)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As Llama spells it."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total if keep_sum else total.new_empty(0)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def _linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return _add_layer_norm(F.linear(x, weight, bias), residual, norm_weight, norm_bias, eps, keep_sum)


def _linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return _add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps, keep_sum)


def _gated_mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Gate and up as two products, as models have them."""
    gate, up = gate_up_weight.chunk(2)
    gate_bias, up_bias = (None, None) if gate_up_bias is None else gate_up_bias.chunk(2)
    hidden = _ACTIVATIONS[activation](F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    return F.linear(hidden, down_weight, down_bias)


def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The weight widened to x's dtype in each call, as a model has it that stores such weights and knows no kernel."""
    return _linear(x, dequantize(weight, scales, zeros, kind, x.dtype), bias, activation, residual)


def _quantized_gated_product(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    gate, up = F.linear(x, dequantize(gate_up_weight, scales, zeros, kind, x.dtype), bias).chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def _rms_norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return _linear(_rms_norm(x, norm_weight, eps), weight, bias, activation, None)


def _rms_norm_gated_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    normed = _rms_norm(x, norm_weight, eps)
    return _gated_mlp(normed, gate_up_weight, down_weight, gate_up_bias, down_bias, activation)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As Llama spells it: half-split, all dimensions rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rope(q, cos, sin, interleaved), _rope(k, cos, sin, interleaved)


def _rope_tables(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> tuple[Tensor, Tensor]:
    """As Llama spells it, with frequencies of float32."""
    angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    kept = getattr(torch, dtype)
    return (angles.cos() * scaling).to(kept), (angles.sin() * scaling).to(kept)


def _append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face's static cache has it, but into copies: the Op leaves its inputs as they are."""
    position = lengths + torch.arange(k.shape[2])
    return k_cache.index_copy(2, position, k), v_cache.index_copy(2, position, v)


def _rope_append(
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
    return _rope(q, cos, sin, interleaved), *_append_kv(k_cache, v_cache, _rope(k, cos, sin, interleaved), v, lengths)


def _linear_rope(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int, rotated: int
) -> Tensor:
    """As Llama spells it, of one product; the last addition is in place, so that queries and keys are not copied."""
    out = F.linear(x, weight, bias)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    heads = out[..., :rotated].unflatten(-1, (-1, head_dim)).transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1) * sin
    heads.mul_(cos).add_(turned)
    return out


def _linear_rope_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, d = k_cache.shape[1], k_cache.shape[3]
    product = F.linear(x, weight, bias).unflatten(-1, (-1, d)).transpose(1, 2)
    q, k, v = product.split([product.shape[1] - 2 * heads, heads, heads], dim=1)
    return _rope_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    mask = bias if key_padding_mask is None else key_padding_mask.bool()[:, None, None, :]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None,
    window: int | None,
    scale: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """As Hugging Face's static cache has it: a mask over the whole cache."""
    mask = torch.arange(k.shape[2]) < lengths.reshape(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _embedding_layer_norm(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    total = F.embedding(ids, word) + F.embedding(position_ids, position)
    if type_ids is not None and type is not None:
        total = total + F.embedding(type_ids, type)
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def _sample_token(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> Tensor:
    """As Hugging Face's `generate` has it, with torch's generator; without min_p."""
    if not do_sample:
        return logits.argmax(dim=-1)
    scores = logits.float() / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort()
        gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1)


def _penalize_repetition(
    logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None
) -> Tensor:
    """As Hugging Face's processor has it, which slices on the host."""
    tokens = tokens[:, : int(length)]
    score = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(score < 0, score * penalty, score / penalty))


def _tensors(*shapes: tuple[int, ...]) -> Maker:
    return lambda dtype: tuple(randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))


def _branch_end(rows: int, k: int, n: int, dtype: torch.dtype) -> Arguments:
    x, weight, residual, scale = _tensors((1, rows, k), (n, k), (1, rows, n), (n,))(dtype)
    return x, weight, None, residual, scale


def _linear_arguments(rows: int, k: int, n: int, activation: str = "none", residual: bool = False) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, bias, other = _tensors((1, rows, k), (n, k), (n,), (1, rows, n))(dtype)
        return x, weight * k**-0.5, bias, activation, other if residual else None

    return arguments


def _gated_mlp_arguments(rows: int, width: int, inner: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, gate_up, down = _tensors((1, rows, width), (2 * inner, width), (width, inner))(dtype)
        return x, gate_up * width**-0.5, down * inner**-0.5

    return arguments


def _quantized_arguments(rows: int, k: int, n: int, kind: Kind) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *_ = _linear_arguments(rows, k, n)(dtype)
        quantized = quantize_weight(weight, kind)
        return x, quantized.data, quantized.scales, quantized.zeros, kind

    return arguments


def _norm_linear_arguments(rows: int, k: int, n: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *_ = _linear_arguments(rows, k, n)(dtype)
        return x, *_tensors((k,))(dtype), 1e-6, weight

    return arguments


def _norm_gated_mlp_arguments(rows: int, width: int, inner: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, *weights = _gated_mlp_arguments(rows, width, inner)(dtype)
        return x, *_tensors((width,))(dtype), 1e-6, *weights

    return arguments


def _rope_arguments(heads: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        angles = torch.arange(seq)[:, None] / 10_000 ** (torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.cat((angles, angles), dim=-1)
        return randn(1, heads, seq, head_dim, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype)

    return arguments


def _rope_qk_arguments(heads: int, key_heads: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        q, *tables = _rope_arguments(heads, seq, head_dim)(dtype)
        return (q, _rope_arguments(key_heads, seq, head_dim)(dtype)[0], *tables)

    return arguments


def _rope_tables_arguments(first: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        inv_freq = 500_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        return torch.arange(first, first + seq)[None], inv_freq, str(dtype)[6:]

    return arguments


def _append_kv_arguments(heads: int, most: int, length: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        cache, new = (1, heads, most, head_dim), (1, heads, seq, head_dim)
        return *_tensors(cache, cache, new, new)(dtype), torch.tensor(length)

    return arguments


def _rope_append_arguments(heads: int, key_heads: int, most: int, length: int, seq: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        q, k, *tables = _rope_qk_arguments(heads, key_heads, seq, head_dim)(dtype)
        k_cache, v_cache, _, v, lengths = _append_kv_arguments(key_heads, most, length, seq, head_dim)(dtype)
        return q, k, v, *tables, k_cache, v_cache, lengths

    return arguments


def _linear_rope_arguments(rows: int, width: int, heads: int, key_heads: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        rotated = (heads + key_heads) * head_dim
        x, weight, *_ = _linear_arguments(rows, width, rotated + key_heads * head_dim)(dtype)
        _, *tables = _rope_arguments(1, rows, head_dim)(dtype)
        return x, weight, None, *tables, head_dim, rotated

    return arguments


def _linear_rope_append_arguments(width: int, heads: int, key_heads: int, most: int, length: int, d: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        x, weight, *_ = _linear_arguments(1, width, (heads + 2 * key_heads) * d)(dtype)
        _, _, _, *rest = _rope_append_arguments(heads, key_heads, most, length, 1, d)(dtype)
        return x, weight, None, *rest

    return arguments


def _attention_arguments(
    batch: int, heads: int, kv_heads: int, seq: int, head_dim: int, padded: bool = False, causal: bool = False
) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        shapes = ((batch, seq, h, head_dim) for h in (heads, kv_heads, kv_heads))
        q, k, v = (tensor.transpose(1, 2) for tensor in _tensors(*shapes)(dtype))  # stored as projections leave them
        mask = torch.arange(seq) < torch.linspace(seq // 2, seq, batch).long()[:, None]
        return q, k, v, None, mask if padded else None, causal

    return arguments


def _cached_attention_arguments(batch: int, heads: int, kv_heads: int, most: int, length: int, head_dim: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        cache = (batch, kv_heads, most, head_dim)
        return *_tensors((batch, heads, 1, head_dim), cache, cache)(dtype), torch.tensor(length)

    return arguments


def _embedding_arguments(batch: int, seq: int, width: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        ids = torch.randint(30_522, (batch, seq), generator=torch.Generator().manual_seed(0))
        tables = _tensors((30_522, width), (512, width), (2, width), (width,), (width,))(dtype)
        word, position, kind, weight, bias = tables
        return ids, word, torch.arange(seq)[None], position, torch.zeros_like(ids), kind, weight, bias, 1e-12

    return arguments


def _sample_arguments(rows: int, size: int, top_k: int, top_p: float, do_sample: bool) -> Maker:
    """One token stands out, so that every generator draws it; the time depends on no logit."""

    def arguments(dtype: torch.dtype) -> Arguments:
        (logits,) = _tensors((rows, size))(dtype)
        logits[:, size // 3] = 200.0
        return logits, torch.tensor(0), torch.tensor(1), 0.8, top_k, top_p, 0.0, do_sample

    return arguments


def _penalize_arguments(rows: int, size: int, length: int) -> Maker:
    def arguments(dtype: torch.dtype) -> Arguments:
        tokens = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
        return *_tensors((rows, size))(dtype), tokens, torch.tensor(length), 1.2

    return arguments


_NORM_SIZES = {"b1 s128 n384": (1, 128, 384), "b8 s128 n768": (8, 128, 768)}

BENCHED: dict[str, tuple[Callable[..., object], dict[str, Maker]]] = {
    "layer_norm": (_layer_norm, {size: _tensors(x, x[-1:], x[-1:]) for size, x in _NORM_SIZES.items()}),
    "add_layer_norm": (_add_layer_norm, {size: _tensors(x, x, x[-1:], x[-1:]) for size, x in _NORM_SIZES.items()}),
    "rms_norm": (_rms_norm, {"b1 s128 n1024": _tensors((1, 128, 1024), (1024,))}),
    "add_rms_norm": (_add_rms_norm, {"b1 s128 n1024": _tensors((1, 128, 1024), (1, 128, 1024), (1024,))}),
    "linear": (
        _linear,
        {
            "m1 k1024 n1024": _linear_arguments(1, 1024, 1024),
            "m16 k384 n1536 gelu": _linear_arguments(16, 384, 1536, "gelu"),
            "m128 k384 n1536 gelu": _linear_arguments(128, 384, 1536, "gelu"),
            "m128 k1536 n384 residual": _linear_arguments(128, 1536, 384, residual=True),
            "m1024 k768 n3072 gelu": _linear_arguments(1024, 768, 3072, "gelu"),
            "m128 k768 n3072 gelu_tanh": _linear_arguments(128, 768, 3072, "gelu_tanh"),
        },
    ),
    "linear_add_layer_norm": (
        _linear_add_layer_norm,
        {"m128 k768 n768": _tensors((1, 128, 768), (768, 768), (768,), (1, 128, 768), (768,), (768,))},
    ),
    "linear_add_rms_norm": (
        _linear_add_rms_norm,
        {"m128 k1024 n1024": lambda dtype: _branch_end(128, 1024, 1024, dtype)},
    ),
    "quantized_linear": (
        _quantized_linear,
        {
            "m1 k1024 n1536 int8": _quantized_arguments(1, 1024, 1536, "int8"),
            "m1 k1024 n1536 int4": _quantized_arguments(1, 1024, 1536, "int4"),
        },
    ),
    "quantized_gated_product": (
        _quantized_gated_product,
        {"t1 d1024 i2816 int4": _quantized_arguments(1, 1024, 5632, "int4")},
    ),
    "rms_norm_linear": (_rms_norm_linear, {"m1 k1024 n1536": _norm_linear_arguments(1, 1024, 1536)}),
    "rms_norm_gated_mlp": (_rms_norm_gated_mlp, {"t1 d1024 i2816": _norm_gated_mlp_arguments(1, 1024, 2816)}),
    "linear_rope": (_linear_rope, {"m128 k1024 h16/4 d64": _linear_rope_arguments(128, 1024, 16, 4, 64)}),
    "gated_mlp": (
        _gated_mlp,
        {
            "t1 d1024 i2816": _gated_mlp_arguments(1, 1024, 2816),
            "t128 d1024 i2816": _gated_mlp_arguments(128, 1024, 2816),
        },
    ),
    "rope": (_rope, {"h16 s128 d64": _rope_arguments(16, 128, 64)}),
    "rope_qk": (_rope_qk, {"h16/4 s128 d64": _rope_qk_arguments(16, 4, 128, 64)}),
    "rope_tables": (
        _rope_tables,
        {"s1 d64": _rope_tables_arguments(300, 1, 64), "s512 d64": _rope_tables_arguments(0, 512, 64)},
    ),
    "append_kv": (_append_kv, {"h4 s1 into 512 d64": _append_kv_arguments(4, 512, 300, 1, 64)}),
    "rope_append": (
        _rope_append,
        {
            "h16/4 s1 into 512 d64": _rope_append_arguments(16, 4, 512, 300, 1, 64),
            "h16/4 s128 into 512 d64": _rope_append_arguments(16, 4, 512, 0, 128, 64),
        },
    ),
    "linear_rope_append": (
        _linear_rope_append,
        {"m1 k1024 h16/4 into 512 d64": _linear_rope_append_arguments(1024, 16, 4, 512, 300, 64)},
    ),
    "attention": (
        _attention,
        {
            "b1 h12 s128 d32": _attention_arguments(1, 12, 12, 128, 32),
            "b8 h12 s128 d32 padded": _attention_arguments(8, 12, 12, 128, 32, padded=True),
            "b1 h12 s512 d64 causal": _attention_arguments(1, 12, 12, 512, 64, causal=True),
            "b1 h16/4 s128 d64 causal": _attention_arguments(1, 16, 4, 128, 64, causal=True),
        },
    ),
    "cached_attention": (
        _cached_attention,
        {
            "b1 h16/4 512 of 1024 d64": _cached_attention_arguments(1, 16, 4, 1024, 512, 64),
            "b8 h12 300 of 512 d64": _cached_attention_arguments(8, 12, 12, 512, 300, 64),
        },
    ),
    "embedding_layer_norm": (_embedding_layer_norm, {"b8 s128 n384": _embedding_arguments(8, 128, 384)}),
    "sample_token": (
        _sample_token,
        {
            "b1 v32000 greedy": _sample_arguments(1, 32_000, 0, 1.0, False),
            "b1 v32000 top-k 50 top-p 0.9": _sample_arguments(1, 32_000, 50, 0.9, True),
        },
    ),
    "penalize_repetition": (_penalize_repetition, {"b1 v32000 s512": _penalize_arguments(1, 32_000, 512)}),
}
"""For each Op how a model spells it with PyTorch's functions, and arguments for each size, made from a dtype."""
