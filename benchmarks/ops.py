"""Group `ops`: every Impl of every Op at realistic sizes, against eager PyTorch and torch.compile.

"eager" is how a model spells the Op with PyTorch's own functions (not the Op's reference, which computes in float32 and
would be an easy peer to beat); "torch.compile" is the same, compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import burnish.ops  # noqa: F401  (registers the Ops)
from benchmarks import gpu_losses, gpu_ops
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.hardware import device
from burnish.op import OPS, Op
from burnish.peers import op_eager as eager
from burnish.peers import op_inputs as inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    if torch.cuda.is_available():
        yield from gpu_ops.cases()
        yield from gpu_losses.cases()
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
    arguments: inputs.Maker,
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


# Sizes of BERT-base (width 768), MiniLM (384) and a Llama of width 1024.
_NORM_SIZES = {"b1 s128 n384": (1, 128, 384), "b8 s128 n768": (8, 128, 768)}

BENCHED: dict[str, tuple[Callable[..., object], dict[str, inputs.Maker]]] = {
    "layer_norm": (eager.layer_norm, {size: inputs.tensors(x, x[-1:], x[-1:]) for size, x in _NORM_SIZES.items()}),
    "add_layer_norm": (
        eager.add_layer_norm,
        {size: inputs.tensors(x, x, x[-1:], x[-1:]) for size, x in _NORM_SIZES.items()},
    ),
    "rms_norm": (eager.rms_norm, {"b1 s128 n1024": inputs.tensors((1, 128, 1024), (1024,))}),
    "add_rms_norm": (eager.add_rms_norm, {"b1 s128 n1024": inputs.tensors((1, 128, 1024), (1, 128, 1024), (1024,))}),
    "all_reduce_add_layer_norm": (
        eager.all_reduce_add_layer_norm,
        {"b1 s128 n768, alone": inputs.tensors((1, 128, 768), (768,), (1, 128, 768), (768,), (768,))},
    ),
    "all_reduce_add_rms_norm": (
        eager.all_reduce_add_rms_norm,
        {"b1 s128 n1024, alone": lambda dtype: inputs.sum_over_ranks(128, 1024, dtype)},
    ),
    "layer_norm_backward": (
        eager.layer_norm_backward,
        {size: inputs.norm_backward_arguments(*x, bias=True) for size, x in _NORM_SIZES.items()},
    ),
    "rms_norm_backward": (
        eager.rms_norm_backward,
        {"b1 s512 n1024": inputs.norm_backward_arguments(1, 512, 1024, bias=False)},
    ),
    "linear": (
        eager.linear,
        {
            "m1 k1024 n1024": inputs.linear_arguments(1, 1024, 1024),
            "m16 k384 n1536 gelu": inputs.linear_arguments(16, 384, 1536, "gelu"),
            "m128 k384 n1536 gelu": inputs.linear_arguments(128, 384, 1536, "gelu"),
            "m128 k1536 n384 residual": inputs.linear_arguments(128, 1536, 384, residual=True),
            "m1024 k768 n3072 gelu": inputs.linear_arguments(1024, 768, 3072, "gelu"),
            "m128 k768 n3072 gelu_tanh": inputs.linear_arguments(128, 768, 3072, "gelu_tanh"),
        },
    ),
    "linear_add_layer_norm": (
        eager.linear_add_layer_norm,
        {"m128 k768 n768": inputs.tensors((1, 128, 768), (768, 768), (768,), (1, 128, 768), (768,), (768,))},
    ),
    "linear_add_rms_norm": (
        eager.linear_add_rms_norm,
        {"m128 k1024 n1024": lambda dtype: inputs.branch_end(128, 1024, 1024, dtype)},
    ),
    "quantized_linear": (
        eager.quantized_linear,
        {
            "m1 k1024 n1536 int8": inputs.quantized_arguments(1, 1024, 1536, "int8"),
            "m1 k1024 n1536 int4": inputs.quantized_arguments(1, 1024, 1536, "int4"),
        },
    ),
    "quantized_gated_product": (
        eager.quantized_gated_product,
        {"t1 d1024 i2816 int4": inputs.quantized_arguments(1, 1024, 5632, "int4")},
    ),
    "rms_norm_linear": (eager.rms_norm_linear, {"m1 k1024 n1536": inputs.norm_linear_arguments(1, 1024, 1536)}),
    "rms_norm_gated_mlp": (
        eager.rms_norm_gated_mlp,
        {"t1 d1024 i2816": inputs.norm_gated_mlp_arguments(1, 1024, 2816)},
    ),
    "linear_rope": (eager.linear_rope, {"m128 k1024 h16/4 d64": inputs.linear_rope_arguments(128, 1024, 16, 4, 64)}),
    "gated_mlp": (
        eager.gated_mlp,
        {
            "t1 d1024 i2816": inputs.gated_mlp_arguments(1, 1024, 2816),
            "t128 d1024 i2816": inputs.gated_mlp_arguments(128, 1024, 2816),
        },
    ),
    "gate": (eager.gate, {"t256 i1408": inputs.tensors((256, 2816))}),
    "gate_backward": (eager.gate_backward, {"t256 i1408": inputs.tensors((256, 1408), (256, 2816))}),
    "linear_gelu_backward": (
        eager.linear_gelu_backward,
        {"t256 d512 i2048": inputs.tensors((256, 512), (512, 2048), (256, 2048))},
    ),
    "linear_with_preactivation": (
        eager.linear_with_preactivation,
        {"t256 d512 i2048": inputs.tensors((256, 512), (2048, 512), (2048,))},
    ),
    "rope": (eager.rope, {"h16 s128 d64": inputs.rope_arguments(16, 128, 64)}),
    "rope_qk": (eager.rope_qk, {"h16/4 s128 d64": inputs.rope_qk_arguments(16, 4, 128, 64)}),
    "rope_tables": (
        eager.rope_tables,
        {"s1 d64": inputs.rope_tables_arguments(300, 1, 64), "s512 d64": inputs.rope_tables_arguments(0, 512, 64)},
    ),
    "append_kv": (eager.append_kv, {"h4 s1 into 512 d64": inputs.append_kv_arguments(4, 512, 300, 1, 64)}),
    "rope_append": (
        eager.rope_append,
        {
            "h16/4 s1 into 512 d64": inputs.rope_append_arguments(16, 4, 512, 300, 1, 64),
            "h16/4 s128 into 512 d64": inputs.rope_append_arguments(16, 4, 512, 0, 128, 64),
        },
    ),
    "linear_rope_append": (
        eager.linear_rope_append,
        {
            "m1 k1024 h16/4 into 512 d64": inputs.linear_rope_append_arguments(1024, 16, 4, 512, 300, 64),
            "m1 k768 h12 into 512 d64, not rotated": inputs.linear_rope_append_arguments(
                768, 12, 12, 512, 300, 64, rotated=False
            ),
        },
    ),
    "quantized_linear_rope_append": (
        eager.quantized_linear_rope_append,
        {
            "m1 k1024 h16/4 into 512 d64 int8": inputs.quantized_linear_rope_append_arguments(
                1024, 16, 4, 512, 300, 64, "int8"
            )
        },
    ),
    "attention": (
        eager.attention,
        {
            "b1 h12 s128 d32": inputs.attention_arguments(1, 12, 12, 128, 32),
            "b8 h12 s128 d32 padded": inputs.attention_arguments(8, 12, 12, 128, 32, padded=True),
            "b1 h12 s512 d64 causal": inputs.attention_arguments(1, 12, 12, 512, 64, causal=True),
            "b1 h16/4 s128 d64 causal": inputs.attention_arguments(1, 16, 4, 128, 64, causal=True),
        },
    ),
    "attention_with_logsumexp": (
        eager.attention_with_logsumexp,
        {"b1 h12 s512 d64 causal": inputs.attention_arguments(1, 12, 12, 512, 64, causal=True)},
    ),
    "attention_backward": (
        eager.attention_backward,
        {
            "b2 h12 s128 d64": inputs.attention_backward_arguments(2, 12, 12, 128, 64),
            "b1 h12 s512 d64 causal": inputs.attention_backward_arguments(1, 12, 12, 512, 64, causal=True),
        },
    ),
    "attention_backward_packed": (
        eager.attention_backward_packed,
        {"b1 h12 s512 d64 causal": inputs.attention_backward_arguments(1, 12, 12, 512, 64, causal=True)},
    ),
    "varlen_attention": (
        eager.varlen_attention,
        {"t512 h12 d32 causal": inputs.varlen_arguments(12, 12, 512, 32)},
    ),
    "varlen_attention_with_logsumexp": (
        eager.varlen_attention_with_logsumexp,
        {"t512 h12 d32 causal": inputs.varlen_arguments(12, 12, 512, 32)},
    ),
    "varlen_attention_backward": (
        eager.varlen_attention_backward,
        {"t512 h12 d32 causal": inputs.varlen_arguments(12, 12, 512, 32, training=True)},
    ),
    "cached_attention": (
        eager.cached_attention,
        {
            "b1 h16/4 512 of 1024 d64": inputs.cached_attention_arguments(1, 16, 4, 1024, 512, 64),
            "b8 h12 300 of 512 d64": inputs.cached_attention_arguments(8, 12, 12, 512, 300, 64),
        },
    ),
    "embedding": (
        eager.embedding,
        {
            "b1 n768, positions": inputs.token_arguments(1, 768, 1024),
            "b16 n4096": inputs.token_arguments(16, 4096, 0),
        },
    ),
    "embedding_backward": (
        eager.embedding_backward,
        {
            "t512 n768, 30522 words": inputs.embedding_backward_arguments(512, 768, 30522),
            "t4096 n768, 50304 words, tied": inputs.embedding_backward_arguments(4096, 768, 50304, tied=True),
        },
    ),
    "embedding_layer_norm": (eager.embedding_layer_norm, {"b8 s128 n384": inputs.embedding_arguments(8, 128, 384)}),
    "cross_entropy": (eager.cross_entropy, {"t128 v50257": inputs.cross_entropy_arguments(128, 50257)}),
    "cross_entropy_with_gradient": (
        eager.cross_entropy_with_gradient,
        {"t128 v50257": inputs.cross_entropy_arguments(128, 50257)},
    ),
    "scale_gradient": (eager.scale_gradient, {"t128 v50257": inputs.scale_arguments(128, 50257)}),
    "linear_cross_entropy": (
        eager.linear_cross_entropy,
        {"t128 k768 v50257": inputs.linear_cross_entropy_arguments(128, 768, 50257)},
    ),
    "linear_cross_entropy_with_gradients": (
        eager.linear_cross_entropy_with_gradients,
        {"t512 k768 v50257": inputs.linear_cross_entropy_arguments(512, 768, 50257)},
    ),
    "sample_token": (
        eager.sample_token,
        {
            "b1 v32000 greedy": inputs.sample_arguments(1, 32_000, 0, 1.0, False),
            "b1 v32000 top-k 50 top-p 0.9": inputs.sample_arguments(1, 32_000, 50, 0.9, True),
        },
    ),
    "penalize_repetition": (eager.penalize_repetition, {"b1 v32000 s512": inputs.penalize_arguments(1, 32_000, 512)}),
}
"""For each Op how a model spells it with PyTorch's functions, and arguments for each size, made from a dtype."""
