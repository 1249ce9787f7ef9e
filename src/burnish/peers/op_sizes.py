"""What makes an Op's inputs large or small, and inputs of any such size: those of one layer of a Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.peers import op_inputs as inputs


@dataclass(frozen=True)
class Layer:
    """A decoder layer's sizes: hidden width, inner width of its MLP, heads of queries and of keys, and their width."""

    width: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"width {self.width}, inner {self.inner}, heads {self.heads}/{self.key_heads} of {self.head_dim}"


LAYERS = {"cpu": Layer(1024, 2816, 16, 4, 64), "cuda": Layer(4096, 14336, 32, 8, 128)}
"""By kind of device: a small Llama's layer, and one of Llama 8B."""

_DEFAULT_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "tokens": {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 4, 16, 64, 256, 1024, 4096)},
    "tokens in the cache": {"cpu": (128, 512, 2048, 8192), "cuda": (512, 2048, 8192, 32768)},
    "logits": {"cpu": (1000, 8000, 32000, 128000), "cuda": (1000, 8000, 32000, 128000)},
}


@dataclass(frozen=True)
class Sized:
    """Inputs of any size: what the size counts, and the arguments for a layer and a size."""

    axis: str
    arguments: Callable[[Layer, int], inputs.Maker]


def _tokens(arguments: Callable[[Layer, int], inputs.Maker]) -> Sized:
    return Sized("tokens", arguments)


def _cached(arguments: Callable[[Layer, int], inputs.Maker]) -> Sized:
    return Sized("tokens in the cache", arguments)


SIZED: dict[str, Sized] = {
    "layer_norm": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (a.width,), (a.width,))),
    "add_layer_norm": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (1, n, a.width), (a.width,), (a.width,))),
    "rms_norm": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (a.width,))),
    "add_rms_norm": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (1, n, a.width), (a.width,))),
    "all_reduce_add_layer_norm": _tokens(
        lambda a, n: inputs.tensors((1, n, a.width), (a.width,), (1, n, a.width), (a.width,), (a.width,))
    ),
    "all_reduce_add_rms_norm": _tokens(lambda a, n: lambda dtype: inputs.sum_over_ranks(n, a.width, dtype)),
    "layer_norm_backward": _tokens(lambda a, n: inputs.norm_backward_arguments(1, n, a.width, bias=True)),
    "rms_norm_backward": _tokens(lambda a, n: inputs.norm_backward_arguments(1, n, a.width, bias=False)),
    "linear": _tokens(lambda a, n: inputs.linear_arguments(n, a.width, a.inner, "gelu")),
    "linear_add_layer_norm": _tokens(
        lambda a, n: inputs.tensors(
            (1, n, a.width), (a.width, a.width), (a.width,), (1, n, a.width), (a.width,), (a.width,)
        )
    ),
    "linear_add_rms_norm": _tokens(lambda a, n: lambda dtype: inputs.branch_end(n, a.width, a.width, dtype)),
    "gated_mlp": _tokens(lambda a, n: inputs.gated_mlp_arguments(n, a.width, a.inner)),
    "gate": _tokens(lambda a, n: inputs.tensors((1, n, 2 * a.inner))),
    "gate_backward": _tokens(lambda a, n: inputs.tensors((1, n, a.inner), (1, n, 2 * a.inner))),
    "linear_gelu_backward": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (a.width, a.inner), (1, n, a.inner))),
    "linear_with_preactivation": _tokens(lambda a, n: inputs.tensors((1, n, a.width), (a.inner, a.width), (a.inner,))),
    "rms_norm_linear": _tokens(lambda a, n: inputs.norm_linear_arguments(n, a.width, a.inner)),
    "rms_norm_gated_mlp": _tokens(lambda a, n: inputs.norm_gated_mlp_arguments(n, a.width, a.inner)),
    "quantized_linear": _tokens(lambda a, n: inputs.quantized_arguments(n, a.width, a.inner, "int8")),
    "quantized_gated_product": _tokens(lambda a, n: inputs.quantized_arguments(n, a.width, 2 * a.inner, "int8")),
    "attention": _tokens(lambda a, n: inputs.attention_arguments(1, a.heads, a.key_heads, n, a.head_dim, causal=True)),
    "varlen_attention": _tokens(lambda a, n: inputs.varlen_arguments(a.heads, a.key_heads, n, a.head_dim)),
    "varlen_attention_with_logsumexp": _tokens(
        lambda a, n: inputs.varlen_arguments(a.heads, a.key_heads, n, a.head_dim)
    ),
    "varlen_attention_backward": _tokens(
        lambda a, n: inputs.varlen_arguments(a.heads, a.key_heads, n, a.head_dim, training=True)
    ),
    "attention_with_logsumexp": _tokens(
        lambda a, n: inputs.attention_arguments(1, a.heads, a.key_heads, n, a.head_dim, causal=True)
    ),
    "attention_backward": _tokens(
        lambda a, n: inputs.attention_backward_arguments(1, a.heads, a.key_heads, n, a.head_dim, causal=True)
    ),
    "attention_backward_packed": _tokens(
        lambda a, n: inputs.attention_backward_arguments(1, a.heads, a.key_heads, n, a.head_dim, causal=True)
    ),
    "rope": _tokens(lambda a, n: inputs.rope_arguments(a.heads, n, a.head_dim)),
    "rope_qk": _tokens(lambda a, n: inputs.rope_qk_arguments(a.heads, a.key_heads, n, a.head_dim)),
    "rope_tables": _tokens(lambda a, n: inputs.rope_tables_arguments(0, n, a.head_dim)),
    "linear_rope": _tokens(lambda a, n: inputs.linear_rope_arguments(n, a.width, a.heads, a.key_heads, a.head_dim)),
    "embedding": _tokens(lambda a, n: inputs.token_arguments(n, a.width, 0)),
    "embedding_backward": _tokens(lambda a, n: inputs.embedding_backward_arguments(n, a.width, 32_000)),
    "embedding_layer_norm": _tokens(lambda a, n: inputs.embedding_arguments(max(1, n // 128), min(n, 128), a.width)),
    "append_kv": _cached(lambda a, n: inputs.append_kv_arguments(a.key_heads, n, n // 2, 1, a.head_dim)),
    "rope_append": _cached(lambda a, n: inputs.rope_append_arguments(a.heads, a.key_heads, n, n // 2, 1, a.head_dim)),
    "linear_rope_append": _cached(
        lambda a, n: inputs.linear_rope_append_arguments(a.width, a.heads, a.key_heads, n, n // 2, a.head_dim)
    ),
    "quantized_linear_rope_append": _cached(
        lambda a, n: inputs.quantized_linear_rope_append_arguments(
            a.width, a.heads, a.key_heads, n, n // 2, a.head_dim, "int8"
        )
    ),
    "cached_attention": _cached(
        lambda a, n: inputs.cached_attention_arguments(1, a.heads, a.key_heads, n, n, a.head_dim)
    ),
    "penalize_repetition": _cached(lambda a, n: inputs.penalize_arguments(1, 32_000, n)),
    "cross_entropy": _tokens(lambda a, n: inputs.cross_entropy_arguments(n, 8 * a.width)),
    "cross_entropy_with_gradient": _tokens(lambda a, n: inputs.cross_entropy_arguments(n, 8 * a.width)),
    "scale_gradient": _tokens(lambda a, n: inputs.scale_arguments(n, 8 * a.width)),
    "linear_cross_entropy": _tokens(lambda a, n: inputs.linear_cross_entropy_arguments(n, a.width, 8 * a.width)),
    "linear_cross_entropy_with_gradients": _tokens(
        lambda a, n: inputs.linear_cross_entropy_arguments(n, a.width, 8 * a.width)
    ),
    "sample_token": Sized("logits", lambda a, n: inputs.sample_arguments(1, n, min(50, n), 0.9, True)),
}
"""By Op."""


def default_sizes(op: str, device: torch.device) -> tuple[int, ...]:
    """Sizes that show how the Op's time grows on this kind of device, within seconds."""
    return _DEFAULT_SIZES[SIZED[op].axis][device.type]


def sized_arguments(op: str, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments for the Op, random with outliers, always the same ones."""
    made = SIZED[op].arguments(LAYERS[device.type], size)(dtype)
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in made)
