"""The fused operators. Each is a function: differentiable, and usable in torch.compile and torch.export."""

from __future__ import annotations

from burnish.ops._dropout import draw_seed as draw_seed
from burnish.ops._nested import attention_nested as attention_nested
from burnish.ops.add_layer_norm import add_layer_norm
from burnish.ops.add_rms_norm import add_rms_norm
from burnish.ops.all_reduce_add_layer_norm import all_reduce_add_layer_norm
from burnish.ops.all_reduce_add_rms_norm import all_reduce_add_rms_norm
from burnish.ops.append_kv import append_kv
from burnish.ops.attention import attention
from burnish.ops.attention_backward import attention_backward
from burnish.ops.attention_backward_packed import attention_backward_packed
from burnish.ops.attention_with_logsumexp import attention_with_logsumexp
from burnish.ops.cached_attention import cached_attention
from burnish.ops.cross_entropy import cross_entropy
from burnish.ops.cross_entropy_with_gradient import cross_entropy_with_gradient
from burnish.ops.embedding import embedding
from burnish.ops.embedding_backward import embedding_backward
from burnish.ops.embedding_layer_norm import embedding_layer_norm
from burnish.ops.gate import gate
from burnish.ops.gate_backward import gate_backward
from burnish.ops.gated_mlp import gated_mlp
from burnish.ops.layer_norm import layer_norm
from burnish.ops.layer_norm_backward import layer_norm_backward
from burnish.ops.linear import linear
from burnish.ops.linear_add_layer_norm import linear_add_layer_norm
from burnish.ops.linear_add_rms_norm import linear_add_rms_norm
from burnish.ops.linear_cross_entropy import linear_cross_entropy
from burnish.ops.linear_cross_entropy_with_gradients import linear_cross_entropy_with_gradients
from burnish.ops.linear_gelu_backward import linear_gelu_backward
from burnish.ops.linear_rope import linear_rope
from burnish.ops.linear_rope_append import linear_rope_append
from burnish.ops.linear_with_preactivation import linear_with_preactivation
from burnish.ops.penalize_repetition import penalize_repetition
from burnish.ops.quantized_gated_product import quantized_gated_product
from burnish.ops.quantized_linear import quantized_linear
from burnish.ops.quantized_linear_rope_append import quantized_linear_rope_append
from burnish.ops.rms_norm import rms_norm
from burnish.ops.rms_norm_backward import rms_norm_backward
from burnish.ops.rms_norm_gated_mlp import rms_norm_gated_mlp
from burnish.ops.rms_norm_linear import rms_norm_linear
from burnish.ops.rope import rope
from burnish.ops.rope_append import rope_append
from burnish.ops.rope_qk import rope_qk
from burnish.ops.rope_tables import rope_tables
from burnish.ops.sample_token import sample_token
from burnish.ops.scale_gradient import scale_gradient
from burnish.ops.varlen_attention import varlen_attention
from burnish.ops.varlen_attention_backward import varlen_attention_backward
from burnish.ops.varlen_attention_with_logsumexp import varlen_attention_with_logsumexp

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "all_reduce_add_layer_norm",
    "all_reduce_add_rms_norm",
    "append_kv",
    "attention",
    "attention_backward",
    "attention_backward_packed",
    "attention_with_logsumexp",
    "cached_attention",
    "cross_entropy",
    "cross_entropy_with_gradient",
    "embedding",
    "embedding_backward",
    "embedding_layer_norm",
    "gate",
    "gate_backward",
    "gated_mlp",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_add_layer_norm",
    "linear_add_rms_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_with_gradients",
    "linear_gelu_backward",
    "linear_rope",
    "linear_rope_append",
    "linear_with_preactivation",
    "penalize_repetition",
    "quantized_gated_product",
    "quantized_linear",
    "quantized_linear_rope_append",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_gated_mlp",
    "rms_norm_linear",
    "rope",
    "rope_append",
    "rope_qk",
    "rope_tables",
    "sample_token",
    "scale_gradient",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_with_logsumexp",
]
