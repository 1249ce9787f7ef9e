"""Group `ops` on a GPU: every Impl of an Op, in bfloat16 unless the name says otherwise, against its best peers.

Each is timed as a CUDA graph on an L2 cache that holds other data.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_attention_training
from benchmarks.gpu import COMPILED, captured, kernels_of, peers
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.hardware import device
from burnish.numerics import randn
from burnish.op import OPS
from burnish.peers.op_eager import sample_token
from burnish.quantize import Kind, quantize_weight
from burnish.tuning import Tuner

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Heads:
    """A layer's width, how many heads of queries and of keys it has, how wide, and whether they are rotated."""

    width: int
    heads: int
    key_heads: int
    head_dim: int
    rotated: bool

    def __str__(self) -> str:
        return f"k{self.width}-h{self.heads}x{self.key_heads}-d{self.head_dim}{'' if self.rotated else '-not-rotated'}"


LLAMA_8B, GPT_2 = Heads(4096, 32, 8, 128, rotated=True), Heads(768, 12, 12, 64, rotated=False)


class GatedMLP(nn.Module):
    """Llama's MLP as Hugging Face spells it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class AddRMSNorm(nn.Module):
    """The sum with the stream and its norm, as Hugging Face's Llama spells them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(total.dtype), total


class RMSNorm(nn.Module):
    """As Hugging Face's Llama spells it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


def cases() -> Iterator[Case]:
    mlps = {"d1024-i11008": (1024, 11008, (2048,)), "d4096-i14336": (4096, 14336, (4096, 16, 1))}
    for size, (width, inner, lengths) in mlps.items():
        for tokens in lengths:
            name = f"gated-mlp-{size}-t{tokens}"
            yield Case(name, partial(_gated_mlp, name=name, width=width, inner=inner, tokens=tokens))
    name = "gated-mlp-training-d2048-i8192-t4096"
    yield Case(name, partial(_gated_mlp_training, name=name, width=2048, inner=8192, tokens=4096))
    name = "rms-norm-linear-k4096-n6144-t1"
    yield Case(name, partial(_rms_norm_linear, name=name, width=4096, columns=6144, tokens=1))
    name = "rms-norm-gated-mlp-d4096-i14336-t1"
    yield Case(name, partial(_rms_norm_gated_mlp, name=name, width=4096, inner=14336, tokens=1))
    kinds: tuple[Kind, ...] = ("int8", "int4", "fp8")
    for kind in kinds:
        for columns, width, tokens in (
            *((6144, 4096, tokens) for tokens in (1, 4, 16)),
            *((4096, 14336, 1), (128256, 4096, 1)),
        ):
            name = f"quantized-linear-{kind}-k{width}-n{columns}-t{tokens}"
            run = partial(_quantized, kind=kind, width=width, columns=columns, tokens=tokens, gated=False)
            yield Case(name, partial(run, name=name))
        for tokens in (1, 16):
            name = f"quantized-gated-product-{kind}-d4096-i14336-t{tokens}"
            run = partial(_quantized, kind=kind, width=4096, columns=2 * 14336, tokens=tokens, gated=True)
            yield Case(name, partial(run, name=name))
    for heads, batch in itertools.product((LLAMA_8B, GPT_2), (1, 16)):
        name = f"linear-rope-append-{heads}-b{batch}"
        yield Case(name, partial(_product_append, name=name, kind=None, size=heads, batch=batch))
    for kind, batch in itertools.product(kinds, (1, 16)):
        name = f"quantized-linear-rope-append-{kind}-{LLAMA_8B}-b{batch}"
        yield Case(name, partial(_product_append, name=name, kind=kind, size=LLAMA_8B, batch=batch))
    for rows, width in ((16384, 4096), (4096, 8192)):
        name = f"add-rms-norm-{rows}x{width}"
        yield Case(name, partial(_add_rms_norm, name=name, rows=rows, width=width))
    for rms, (rows, width) in itertools.product((True, False), ((16384, 4096), (12288, 768))):
        name = f"{'rms' if rms else 'layer'}-norm-backward-{rows}x{width}"
        yield Case(name, partial(_norm_backward, name=name, rms=rms, rows=rows, width=width))
    for name, shape, dtype, causal in (
        ("sdpa-32x32x1024x32-fp16", (32, 32, 1024, 32), torch.float16, False),
        ("sdpa-16x16x512x64-bf16", (16, 16, 512, 64), torch.bfloat16, False),
        ("sdpa-4x32x4096x128-bf16-causal", (4, 32, 4096, 128), torch.bfloat16, True),
    ):
        yield Case(name, partial(_sdpa, name=name, shape=shape, dtype=dtype, causal=causal))
    yield from gpu_attention_training.cases()
    for batch, length in ((32, 4096), (1, 8192)):
        name = f"decode-attention-b{batch}-l{length}-gqa32x8-d128-bf16"
        yield Case(name, partial(_decode_attention, name=name, batch=batch, length=length))
    for batch, choice, top_k, top_p in ((1, "greedy", 0, 1.0), (16, "greedy", 0, 1.0), (1, "k50-p0.9", 50, 0.9)):
        name = f"sample-token-{choice}-b{batch}-v128256-bf16"
        yield Case(name, partial(_sample_token, name=name, batch=batch, top_k=top_k, top_p=top_p))


def _gated_mlp(session: Session, *, name: str, width: int, inner: int, tokens: int) -> list[Record]:
    torch.manual_seed(0)
    model = GatedMLP(width, inner).to("cuda", torch.bfloat16).requires_grad_(False)
    x = randn(1, tokens, width, dtype=torch.bfloat16, device="cuda", seed=1)
    weights = torch.cat([model.gate_proj.weight, model.up_proj.weight]), model.down_proj.weight
    liger = _liger_mlp(model, x)
    more = {} if liger is None else {"liger": captured(liger)}
    return _run(session, name, "gated_mlp", (x, *weights), model, {"x": x}, more)


def _gated_mlp_training(session: Session, *, name: str, width: int, inner: int, tokens: int) -> list[Record]:
    """Forward and backward, for the gradients of x and of all weights."""
    torch.manual_seed(0)
    model = GatedMLP(width, inner).to("cuda", torch.bfloat16)
    x, grad = (randn(1, tokens, width, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2))
    weights = model.gate_proj.weight, model.up_proj.weight, model.down_proj.weight
    packed = torch.cat(weights[:2]).detach().requires_grad_()
    op = OPS["gated_mlp"]

    def gradients(run: Callable[[], Any], *wanted: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(run(), [x, *wanted], grad.to(wanted[0].dtype))

    x.requires_grad_()
    variants = {
        "burnish": gradients(lambda: op(x, packed, weights[2]), packed, weights[2]),
        "eager": gradients(lambda: model(x), *weights),
    }
    for variant, mode in COMPILED.items():
        if session.wants(variant):
            torch.compiler.reset()
            compiled = torch.compile(model, mode=mode)
            variants[variant] = gradients(partial(compiled, x), *weights)
            variants[variant]()
    if session.wants("liger") and (liger := _liger_mlp(model, x)):
        variants["liger"] = gradients(liger, *weights)
    wide = copy.deepcopy(model).double()
    truth = torch.autograd.grad(wide(x.double()), [x, *wide.parameters()], grad.double())
    eager = variants["eager"]()
    (dx, *of_weights), (d_x, d_packed, d_down) = eager, variants["burnish"]()
    verdict = numerics.check((d_x, *d_packed.chunk(2), d_down), (dx, *of_weights), truth)
    if not verdict.ok:
        raise CheckError(str(verdict.reason))
    del wide, truth
    memory = {variant: _peak_bytes(run) for variant, run in variants.items()}
    timed = {variant: captured(run) for variant, run in variants.items()}
    kernels = {variant: len(kernels_of(run)) for variant, run in timed.items()}
    result = session.time(timed, cold_l2=True)
    cost = op.cost(x, packed, weights[2])
    floor = 3 * device().floor_us(cost.flops, cost.bytes, x.dtype)
    session.console.print(result)
    session.console.print(f"  floor {floor:.1f} us; peak MiB: { {v: m >> 20 for v, m in memory.items()} }")
    return result.records(name, session.command(name), kernels=kernels, floor_us=floor)


def _peak_bytes(run: Callable[[], object]) -> int:
    """What a call takes beyond what lives before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rms_norm_linear(session: Session, *, name: str, width: int, columns: int, tokens: int) -> list[Record]:
    torch.manual_seed(0)
    norm, linear = RMSNorm(width), nn.Linear(width, columns, bias=False)
    model = nn.Sequential(norm, linear).to("cuda", torch.bfloat16).requires_grad_(False)
    x = randn(1, tokens, width, dtype=torch.bfloat16, device="cuda", seed=1)
    return _run(session, name, "rms_norm_linear", (x, norm.weight, 1e-6, linear.weight), model, {"input": x}, {})


def _rms_norm_gated_mlp(session: Session, *, name: str, width: int, inner: int, tokens: int) -> list[Record]:
    torch.manual_seed(0)
    norm, mlp = RMSNorm(width), GatedMLP(width, inner)
    model = nn.Sequential(norm, mlp).to("cuda", torch.bfloat16).requires_grad_(False)
    x = randn(1, tokens, width, dtype=torch.bfloat16, device="cuda", seed=1)
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight
    return _run(session, name, "rms_norm_gated_mlp", (x, norm.weight, 1e-6, *weights), model, {"input": x}, {})


def _quantized(
    session: Session, *, name: str, kind: Kind, width: int, columns: int, tokens: int, gated: bool
) -> list[Record]:
    """Against the product of the weight that was quantized by cuBLAS, and torch's of 8 and 4 bits where it has them."""
    wide = randn(columns, width, dtype=torch.bfloat16, device="cuda") / width**0.5
    x = randn(1, tokens, width, dtype=torch.bfloat16, device="cuda", seed=1)
    quantized = quantize_weight(wide, kind)
    args = (x, quantized.data, quantized.scales, quantized.zeros, kind)
    rows = x.view(tokens, width)
    found: dict[str, Callable[[], Tensor]] = {"cublas-bf16": lambda: F.linear(rows, wide)}
    if kind == "int8":
        entries = (wide / quantized.scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        scales = quantized.scales.bfloat16()
        found["torch-int8"] = lambda: torch._weight_int8pack_mm(rows, entries, scales)
    elif kind == "int4":
        # Random entries: what they are does not count for the time, and torch has a layout of its own.
        bits = torch.randint(0, 256, (columns, width // 2), dtype=torch.uint8, device="cuda")
        with contextlib.suppress(RuntimeError):
            packed = torch._convert_weight_to_int4pack(bits, 8)
            both = torch.ones(width // 128, columns, 2, dtype=torch.bfloat16, device="cuda")
            found["torch-int4"] = lambda: torch._weight_int4pack_mm(rows, packed, 128, both)
    more: dict[str, Callable[[], object]] = {}
    for variant, run in found.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):  # not on this device
            run()
            more[variant] = captured(run)
    return _run(session, name, "quantized_gated_product" if gated else "quantized_linear", args, None, {}, more)


def _product_append(session: Session, *, name: str, kind: Kind | None, size: Heads, batch: int) -> list[Record]:
    """One new token of each text, against the product of a float weight by cuBLAS alone."""
    rows = (size.heads + 2 * size.key_heads) * size.head_dim
    wide = randn(rows, size.width, dtype=torch.bfloat16, device="cuda") / size.width**0.5
    bias = None if size.rotated else randn(rows, dtype=torch.bfloat16, device="cuda", seed=2)
    x = randn(batch, 1, size.width, dtype=torch.bfloat16, device="cuda", seed=1)
    caches = (randn(batch, size.key_heads, 1024, size.head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    tables = (randn(1, size.head_dim, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (3, 4))
    rest = (bias, *(tables if size.rotated else (None, None)), *caches, torch.tensor(512, device="cuda"))
    more = {"cublas-product": captured(lambda: F.linear(x, wide, bias))}
    if kind is None:
        return _run(session, name, "linear_rope_append", (x, wide, *rest), None, {}, more)
    stored = quantize_weight(wide, kind)
    weight = stored.data, stored.scales, stored.zeros, kind
    return _run(session, name, "quantized_linear_rope_append", (x, *weight, *rest), None, {}, more)


def _add_rms_norm(session: Session, *, name: str, rows: int, width: int) -> list[Record]:
    model = AddRMSNorm(width).to("cuda", torch.bfloat16).requires_grad_(False)
    x, residual = (randn(rows, width, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2))
    inputs = {"x": x, "residual": residual}
    return _run(session, name, "add_rms_norm", (x, residual, model.weight, 1e-6), model, inputs, _liger_norm(model, x))


def _norm_backward(session: Session, *, name: str, rms: bool, rows: int, width: int) -> list[Record]:
    """Against the backward passes alone of eager PyTorch, torch.compile and Liger, with the statistics they keep."""
    grad, x = (randn(rows, width, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (1, 2))
    weight, bias = (randn(width, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (3, 4))
    function: Callable[..., object]
    given: tuple[Tensor, ...]
    if rms:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        function, given = _eager_rms_norm_backward, (grad, x, rstd, weight)
    else:
        _, mean, rstd = torch.native_layer_norm(x, (width,), weight, bias, 1e-6)
        function, given = _eager_layer_norm_backward, (grad, x, mean, rstd, weight, bias)
    more = {"eager-graph": captured(partial(function, *given))}
    for variant, mode in COMPILED.items():
        if session.wants(f"{variant}-graph"):
            torch.compiler.reset()
            more[f"{variant}-graph"] = captured(partial(torch.compile(function, mode=mode), *given))
    more |= _liger_norm_backward(grad, x, weight, None if rms else bias)
    args = (grad, x, weight, 1e-6) if rms else (grad, x, weight, bias, 1e-6)
    return _run(session, name, "rms_norm_backward" if rms else "layer_norm_backward", args, None, {}, more)


def _eager_rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd makes of Llama's spelling."""
    scaled, wide = (grad * weight).float(), x.float()
    along = (scaled * wide).sum(-1, keepdim=True) / x.shape[-1]
    dx = (scaled * rstd - wide * (along * rstd.pow(3))).to(x.dtype)
    return dx, (grad * (wide * rstd).to(x.dtype)).sum(0)


def _eager_layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    slopes: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    return slopes


def _sdpa(session: Session, *, name: str, shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> list[Record]:
    q, k, v = (
        randn(shape[0], shape[2], shape[1], shape[3], dtype=dtype, device="cuda", seed=seed).transpose(1, 2)
        for seed in range(3)
    )
    more = _backends(q, k, v, is_causal=causal)
    return _run(session, name, "attention", (q, k, v, None, None, causal), None, {}, more)


def _decode_attention(session: Session, *, name: str, batch: int, length: int) -> list[Record]:
    q, k, v = (
        randn(batch, heads, tokens, 128, dtype=torch.bfloat16, device="cuda", seed=seed)
        for seed, (heads, tokens) in enumerate(((32, 1), (8, length), (8, length)))
    )
    args = (q, k, v, torch.tensor(length, device="cuda"))
    more = _backends(q, k, v, enable_gqa=True)
    return _run(session, name, "cached_attention", args, None, {}, more)


def _sample_token(session: Session, *, name: str, batch: int, top_k: int, top_p: float) -> list[Record]:
    """Against torch's argmax, or what `generate` does with torch's generator."""
    logits = randn(batch, 128256, dtype=torch.bfloat16, device="cuda", seed=1)
    number = torch.tensor(1, device="cuda")
    args = OPS["sample_token"].bind(logits, number, number, 0.8, top_k, top_p, do_sample=top_k > 0)
    more = {"torch": captured(partial(sample_token, *args))}
    return _run(session, name, "sample_token", args, None, {}, more)


def _backends(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, enable_gqa: bool = False
) -> dict[str, Callable[[], object]]:
    """F.scaled_dot_product_attention by each backend that takes these inputs."""
    found: dict[str, Callable[[], object]] = {}
    for variant, backend in BACKENDS.items():

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

        with contextlib.suppress(RuntimeError):  # no kernel of this backend
            run()
            found[variant] = captured(run)
    return found


@torch.no_grad()
def _run(
    session: Session,
    name: str,
    op_name: str,
    args: tuple[Any, ...],
    model: nn.Module | None,
    inputs: dict[str, Tensor],
    more: dict[str, Callable[[], object]],
) -> list[Record]:
    op = OPS[op_name]
    bound = op.bind(*args)
    truth, reference = numerics.oracle(op.reference, *bound), op.reference(*bound)
    impls: dict[str, Callable[[], object]] = {}
    tuner = Tuner()
    for impl in op.impls.values():
        if impl.name != "reference" and not impl.why_not(*bound):
            impls[impl.name] = partial(impl.fn, *bound)
    # In place, as in a model; in the checks the others write to copies.
    fastest, choice = tuner.choose(op, bound, budget_us=1e6, thorough=True, in_place=bool(op.donates))
    impls[choice.impl] = partial(fastest, *bound)
    tuner.save()
    wrong = {n: r for n, r in verdicts({n: run() for n, run in impls.items()}, reference, truth).items() if r}
    if wrong:
        raise CheckError("; ".join(f"{n}: {reason}" for n, reason in wrong.items()))
    variants = {"burnish": captured(partial(fastest, *bound))}
    if model is not None:
        variants |= peers(model, inputs, session.wants)
    rest = {f"impl {n}": partial(op.impls[n].in_place or op.impls[n].fn, *bound) for n in impls if n != choice.impl}
    variants |= {n: run for n, run in more.items() if session.wants(n)}
    variants |= {n: captured(run) for n, run in rest.items() if session.wants(n)}
    kernels = {variant: len(kernels_of(run)) for variant, run in variants.items()}
    result = session.time(variants, cold_l2=True)
    cost = op.cost(*bound)
    floor = device().floor_us(cost.flops, cost.bytes, args[0].dtype)
    session.console.print(result)
    session.console.print(f"  {choice.impl} {choice.config}: floor {floor:.1f} us; {choice.times_us}")
    records = result.records(name, session.command(name), kernels=kernels, floor_us=floor)
    others = [r["median_us"] for r in records if r["variant"].startswith(("compile", "sdpa", "liger"))]
    mine = records[0]["median_us"]
    ratio = f", {mine / min(others):.3f} of the best peer" if others else ""
    session.console.print(f"  {name}: burnish {mine:.1f} us{ratio}, {mine / floor:.3f} floors")
    return records


def _liger_mlp(model: GatedMLP, x: Tensor) -> Callable[[], object] | None:
    """With SiLU; None where Liger is not installed."""
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return lambda: model.down_proj(LigerSiLUMulFunction.apply(model.gate_proj(x), model.up_proj(x)))


def _liger_norm(model: AddRMSNorm, x: Tensor) -> dict[str, Callable[[], object]]:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return {}
    residual = randn(*x.shape, dtype=x.dtype, device="cuda", seed=2)
    return {"liger": captured(lambda: LigerFusedAddRMSNormFunction.apply(x, residual, model.weight, 1e-6))}


def _liger_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> dict[str, Callable[[], object]]:
    """Of RMS norm, as Llama has it, without a bias; of layer norm with one."""
    try:
        from liger_kernel.ops import layer_norm, rms_norm
    except ImportError:
        return {}
    if bias is None:
        _, flat, rstd, block, warps, casting = rms_norm.rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)
        rest = 0.0, casting, block, warps, False, None  # offset, ..., not in place, the number of rows decides
        return {"liger": captured(lambda: rms_norm.rms_norm_backward(grad, flat, weight, rstd, *rest))}
    _, flat, mean, rstd, *_ = layer_norm.layer_norm_forward(x, weight, bias, 1e-6)
    return {"liger": captured(lambda: layer_norm.layer_norm_backward(grad, flat, weight, bias, mean, rstd))}
