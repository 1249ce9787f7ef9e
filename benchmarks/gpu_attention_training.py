"""Attention forward and backward on a GPU, for the group `ops`: every Impl in both passes, against PyTorch's backends
through autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import captured, kernels_of
from benchmarks.runner import Case, CheckError, Record, Session
from burnish import numerics
from burnish.hardware import device
from burnish.numerics import randn
from burnish.op import OPS

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SIZES = (
    ("4x32x4096x128-bf16-causal", (4, 32, 4096, 128), True),
    ("16x16x512x64-bf16", (16, 16, 512, 64), False),
    ("12x12x1024x64-bf16-causal", (12, 12, 1024, 64), True),  # nanoGPT's
)
Run = Callable[[], tuple[Tensor, ...]]


def cases() -> Iterator[Case]:
    for size, shape, causal in _SIZES:
        name = f"attention-training-{size}"
        yield Case(name, partial(_attention_training, name=name, shape=shape, causal=causal))


def _attention_training(session: Session, *, name: str, shape: tuple[int, ...], causal: bool) -> list[Record]:
    batch, heads, length, width = shape
    q, k, v, grad = (
        randn(batch, length, heads, width, dtype=torch.bfloat16, device="cuda", seed=seed).transpose(1, 2)
        for seed in range(4)
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    op = OPS["attention"]
    runs: dict[str, Run] = {"burnish": lambda: torch.autograd.grad(op(q, k, v, is_causal=causal), (q, k, v), grad)}
    runs |= _by_impl(q, k, v, grad, causal)
    for variant, backend in BACKENDS.items():

        def by_backend(backend: SDPBackend = backend) -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return torch.autograd.grad(out, (q, k, v), grad)

        with contextlib.suppress(RuntimeError):  # no kernel of this backend
            by_backend()
            runs[variant] = by_backend
    _check(runs, q, k, v, grad, causal)
    timed = {variant: captured(run) for variant, run in runs.items() if variant == "burnish" or session.wants(variant)}
    kernels = {variant: len(kernels_of(run)) for variant, run in timed.items()}
    result = session.time(timed, cold_l2=True)
    forward = OPS["attention"].cost(q, k, v, is_causal=causal)
    floor = device().floor_us(forward.flops * 7 // 2, forward.bytes * 3, q.dtype)  # two products, then five
    session.console.print(result)
    session.console.print(f"  floor {floor:.1f} us")
    return result.records(name, session.command(name), kernels=kernels, floor_us=floor)


def _by_impl(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> dict[str, Run]:
    """Each Impl of both passes; of one with configs the backward pass with each."""
    forward, backward = OPS["attention_with_logsumexp"], OPS["attention_backward"]
    args = forward.bind(*(t.detach() for t in (q, k, v)), is_causal=causal)
    found: dict[str, Run] = {}
    for name, impl in backward.impls.items():
        if name == "reference" or forward.impls[name].why_not(*args):
            continue
        results = forward.impls[name].fn(*args)
        configs = impl.configs(grad, *args[:3], *results, *args[3:], False) if impl.configs is not None else [None]
        for config in configs:

            def run(name: str = name, config: object = config) -> tuple[Tensor, ...]:
                out, logsumexp = forward.impls[name].fn(*args)
                given = {} if config is None else {"config": config}
                dq, dk, dv, _ = backward.impls[name].fn(grad, *args[:3], out, logsumexp, *args[3:], False, **given)
                return dq, dk, dv

            found[f"impl {name}" if config is None else f"impl {name} {config}"] = run
    return found


def _check(runs: dict[str, Run], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> None:
    """CheckError for gradients that are not right: those of two heads, which know nothing of the others."""
    reference = OPS["attention"].reference

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        part = [t.detach()[:1, :2].to(dtype).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(reference(*part, is_causal=causal), part, grad[:1, :2].to(dtype))

    eager, true = gradients(q.dtype), gradients(torch.float64)
    wrong = {}
    for variant, run in runs.items():
        verdict = numerics.check(tuple(t[:1, :2] for t in run()), eager, true)
        if not verdict.ok and not variant.startswith("sdpa"):
            wrong[variant] = verdict.reason
    if wrong:
        raise CheckError("; ".join(f"{variant}: {reason}" for variant, reason in wrong.items()))
