"""How a model spells each Op with PyTorch's own functions: what there is before any fusing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.peers.op_eager_attention import attention as attention
from burnish.peers.op_eager_attention import attention_backward as attention_backward
from burnish.peers.op_eager_attention import attention_backward_packed as attention_backward_packed
from burnish.peers.op_eager_attention import attention_with_logsumexp as attention_with_logsumexp
from burnish.peers.op_eager_attention import cached_attention as cached_attention
from burnish.peers.op_eager_attention import varlen_attention as varlen_attention
from burnish.peers.op_eager_attention import varlen_attention_backward as varlen_attention_backward
from burnish.peers.op_eager_attention import varlen_attention_with_logsumexp as varlen_attention_with_logsumexp
from burnish.peers.op_eager_norms import add_layer_norm as add_layer_norm
from burnish.peers.op_eager_norms import add_rms_norm as add_rms_norm
from burnish.peers.op_eager_norms import all_reduce_add_layer_norm as all_reduce_add_layer_norm
from burnish.peers.op_eager_norms import all_reduce_add_rms_norm as all_reduce_add_rms_norm
from burnish.peers.op_eager_norms import layer_norm as layer_norm
from burnish.peers.op_eager_norms import layer_norm_backward as layer_norm_backward
from burnish.peers.op_eager_norms import rms_norm as rms_norm
from burnish.peers.op_eager_norms import rms_norm_backward as rms_norm_backward
from burnish.quantize import dequantize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return add_layer_norm(F.linear(x, weight, bias), residual, norm_weight, norm_bias, eps, keep_sum)


def linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps, keep_sum)


def gated_mlp(
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


def gate(gate_up: Tensor, activation: str) -> Tensor:
    gates, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gates) * up


def gate_backward(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    """What autograd runs where the activated gate was not kept."""
    gates, up = gate_up.chunk(2, dim=-1)
    active, d_active = _ACTIVATIONS[activation](gates), grad_hidden * up
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(d_active, gates)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        d_gate = torch.ops.aten.gelu_backward(d_active, gates, approximate=approximate)
    return torch.cat((d_gate, grad_hidden * active), dim=-1), active * up if keep_hidden else gate_up.new_empty(0)


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd runs where the result of GELU was not kept."""
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    dx = torch.ops.aten.gelu_backward(grad @ weight, x, approximate=approximate)
    hidden = _ACTIVATIONS[activation](x) if keep_hidden else x.new_empty(0)
    return dx, hidden, dx.flatten(0, -2).sum(0).float()


def linear_with_preactivation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    return _ACTIVATIONS[activation](pre), pre


def quantized_linear(
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
    return linear(x, dequantize(weight, scales, zeros, kind, x.dtype), bias, activation, residual)


def quantized_gated_product(
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


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return linear(rms_norm(x, norm_weight, eps), weight, bias, activation, None)


def rms_norm_gated_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    normed = rms_norm(x, norm_weight, eps)
    return gated_mlp(normed, gate_up_weight, down_weight, gate_up_bias, down_bias, activation)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As Llama spells it: half-split, all dimensions rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)


def rope_tables(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> tuple[Tensor, Tensor]:
    """As Llama spells it, with frequencies of float32."""
    angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    kept = getattr(torch, dtype)
    return (angles.cos() * scaling).to(kept), (angles.sin() * scaling).to(kept)


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face's static cache has it, but into copies: the Op leaves its inputs as they are."""
    position = lengths + torch.arange(k.shape[2], device=k.device)
    return k_cache.index_copy(2, position, k), v_cache.index_copy(2, position, v)


def rope_append(
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
    return rope(q, cos, sin, interleaved), *append_kv(k_cache, v_cache, rope(k, cos, sin, interleaved), v, lengths)


def linear_rope(
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


def linear_rope_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without tables nothing is rotated, as GPT-2 spells it."""
    heads, d = k_cache.shape[1], k_cache.shape[3]
    product = F.linear(x, weight, bias).unflatten(-1, (-1, d)).transpose(1, 2)
    q, k, v = product.split([product.shape[1] - 2 * heads, heads, heads], dim=1)
    if cos is None or sin is None:
        return q, *append_kv(k_cache, v_cache, k, v, lengths)
    return rope_append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def quantized_linear_rope_append(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_rope_append(x, dequantize(weight, scales, zeros, kind, x.dtype), bias, *rest)


def embedding(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> Tensor:
    words = F.embedding(ids, word)
    return words if position_ids is None or position is None else words + F.embedding(position_ids, position)


def embedding_backward(
    grad: Tensor, ids: Tensor, entries: int, table_grad: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    table: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, entries, -1, False)
    if table_grad is None:
        return table
    return table_grad.to(table.dtype).mul_(1 if scale is None else scale).add_(table)


def embedding_layer_norm(
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


def sample_token(
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


def penalize_repetition(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    """As Hugging Face's processor has it, which slices on the host."""
    tokens = tokens[:, : int(length)]
    score = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(score < 0, score * penalty, score / penalty))


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    """Of logits in float32, as models cast them; without z-loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def cross_entropy_with_gradient(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Forward and backward, by autograd."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss = cross_entropy(logits, target, *options)
        return loss.detach(), torch.autograd.grad(loss, logits, grad_loss)[0]


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient * (factor if factor.dim() == 0 else factor[:, None]).to(gradient.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return cross_entropy(F.linear(x, weight, bias), target, *options)


def linear_cross_entropy_with_gradients(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, grad_loss: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Forward and backward, by autograd."""
    *options, needs_x, needs_weight, needs_bias = rest
    needs = [(x, needs_x), (weight, needs_weight), (bias, needs_bias)]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in needs]
        loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], *options)  # type: ignore[arg-type]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, grad_loss))
    return loss.detach(), *(next(found) if need else x.new_empty(0) for _, need in needs)
