"""Compiles ahead of time what Triton launches for a product of few rows and what joins it at Llama's and GPT-2's sizes,
by every config.

Run as `python -m tests.kernels.aot_normed` in a process of its own, as `tests.kernels.aot` is. Prints one JSON list.
`moved` are the blocks that go from one layout to another in the loop, through shared memory, less x and the norm's
weight: where Triton chose so, each block of the product's weight did.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from burnish.op import find_op
from tests.kernels.aot import CAPABILITIES, SMS, _compile, _key, _resources


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Op, Impl and arguments."""
    for rows in (1, 8):
        x, scale = _empty(1, rows, 4096), _empty(4096)
        yield "rms_norm_linear", "triton_gemv", (x, scale, 1e-6, _empty(6144, 4096))
        yield "rms_norm_linear", "triton_gemv", (x, None, 1e-6, _empty(6144, 4096))
        weights = _empty(2 * 14336, 4096), _empty(4096, 14336)
        yield "rms_norm_gated_mlp", "triton_gemv", (x, scale, 1e-6, *weights)
    for rows, impl in ((1, "triton_gemv"), (8, "triton_gemv"), (16, "triton_skinny"), (32, "triton_skinny")):
        of_llama = _empty(rows, 1, 128), _empty(rows, 1, 128), *_caches(rows, 8, 128)
        yield "linear_rope_append", impl, (_empty(rows, 1, 4096), _empty(6144, 4096), _empty(6144), *of_llama)
        if rows <= 8:
            yield "linear_rope_append", impl, (_empty(rows, 1, 4096), _empty(6144, 4096), None, *of_llama)
        if rows <= 16:
            of_gpt2 = None, None, *_caches(rows, 12, 64)
            yield "linear_rope_append", impl, (_empty(rows, 1, 768), _empty(2304, 768), _empty(2304), *of_gpt2)


def _caches(rows: int, heads: int, d: int) -> tuple[torch.Tensor, ...]:
    return _empty(rows, heads, 1024, d), _empty(rows, heads, 1024, d), torch.tensor(7)


def launches(capability: int) -> Iterator[tuple[str, Any, int]]:
    from burnish.kernels.launch import Launch, Target, recording

    for name, impl_name, args in calls():
        op = find_op(name)
        impl, bound, recorded = op.impls[impl_name], op.bind(*args), list[Launch]()
        with recording(recorded.append, Target(divmod(capability, 10), SMS[capability])):
            for config in impl.configs(*bound):  # type: ignore[misc]
                recorded.clear()
                impl.fn(*bound, config=config)
                yield f"{name} {tuple(args[0].shape)} {config}", recorded[0], capability


def _compiled(label: str, launch: Any, capability: int) -> dict[str, Any]:
    try:
        compiled = _compile(launch, capability)
    except Exception as error:
        return {"label": label, "capability": capability, "error": f"{type(error).__name__}: {error}"}
    loop = compiled.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    shapes = re.findall(r"ttg\.convert_layout .*-> tensor<(\d+)x(\d+)x(\d+)x", loop)
    moved = ["x".join(shape) for shape in shapes if int(shape[1]) > 1]  # x and the norm's weight are (rows, 1, K)
    return {"label": label, "capability": capability, "moved": moved, **_resources(compiled.asm["cubin"])}


if __name__ == "__main__":
    jobs = {_key(job[1], job[2]): job for capability in CAPABILITIES for job in launches(capability)}
    json.dump([_compiled(*job) for job in jobs.values()], sys.stdout)
