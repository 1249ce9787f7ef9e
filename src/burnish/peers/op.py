"""The peers of one Op: its spelling with PyTorch's own functions, compiled and by each attention backend, and Liger."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.bench import Within
from burnish.peers import op_eager

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
"""PyTorch's attention kernels by a variant's name."""

COMPILE = "torch.compile"
_ATTENTION = ("attention", "cached_attention")


def op_peers(
    op: str, args: Sequence[Any], compile_modes: Sequence[str] = ()
) -> tuple[dict[str, Callable[..., object]], dict[str, str]]:
    """The ways to compute `op(*args)` without Burnish, eager first, and why each other one cannot.

    args: all of the Op's arguments. compile_modes: of torch.compile, "default" and its like; each compiles for these
    sizes alone, at its first call.
    """
    eager = getattr(op_eager, op)
    variants: dict[str, Callable[..., object]] = {"eager": eager}
    missing: dict[str, str] = {}
    variants |= compiled(eager, compile_modes)
    if op in _ATTENTION:
        able, missing = by_backend(eager, args)
        variants |= able
    liger = _LIGER.get(op)
    if liger is not None:
        if reason := _why_no_liger(args):
            missing["liger"] = reason
        else:
            variants["liger"] = liger
    return variants, missing


def compiled(function: Callable[..., object], modes: Sequence[str]) -> dict[str, Callable[..., object]]:
    """torch.compile in each mode, for fixed sizes: it is forgotten beforehand what was compiled for others."""
    if modes:
        torch.compiler.reset()
    return {
        COMPILE if mode == "default" else f"{COMPILE} {mode}": torch.compile(
            function, mode=None if mode == "default" else mode, dynamic=False
        )
        for mode in modes
    }


def by_backend(
    function: Callable[..., object], args: Sequence[Any]
) -> tuple[dict[str, Callable[..., object]], dict[str, str]]:
    """The function with PyTorch's attention by each backend, and why the others do not take these inputs."""
    able: dict[str, Callable[..., object]] = {}
    missing: dict[str, str] = {}
    for name, backend in SDPA.items():
        context: Callable[[], AbstractContextManager[object]] = partial(sdpa_kernel, backend)
        with warnings.catch_warnings(record=True) as said, torch.no_grad(), context():
            warnings.simplefilter("always")
            try:
                function(*args)
            except RuntimeError:
                missing[name] = _why_no_kernel([str(warning.message) for warning in said])
                continue
        able[name] = Within(function, context)
    return able, missing


def _why_no_kernel(warnings_said: Sequence[str]) -> str:
    """PyTorch warns of what each kernel lacks; that those not asked for are disabled says nothing."""
    said = [text.split(" (Triggered")[0].rstrip(".: ") for text in warnings_said]
    reasons = [text for text in said if not text.endswith(("not used because", "runtime disabled"))]
    return "; ".join(reasons) or "there is none for these inputs on this device"


# --- Liger ------------------------------------------------------------------------------------------------------------


def _why_no_liger(args: Sequence[Any]) -> str | None:
    if not args[0].is_cuda:
        return "its kernels are for CUDA"
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return "pip install liger-kernel"
    return None


def _liger_gated_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, *rest: Any) -> Tensor:
    """SiLU, without biases, as in Llama."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = gate_up_weight.chunk(2)
    return F.linear(LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up)), down_weight)


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    normed: Tensor = LigerRMSNormFunction.apply(x, weight, eps)
    return normed


_LIGER: dict[str, Callable[..., Any]] = {"gated_mlp": _liger_gated_mlp, "rms_norm": _liger_rms_norm}
