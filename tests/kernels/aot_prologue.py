"""Compiles ahead of time what the Ops with a norm in the prologue launch at models' sizes, with every config of theirs.

Run as `python -m tests.kernels.aot_prologue [CAPABILITY...]` in a process of its own, as `tests.kernels.aot` is. Prints
one JSON list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from burnish.op import find_op
from tests.kernels.aot import CAPABILITIES, SMS, _compiled, _key


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def calls(rows: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Llama 8B's q, k, v and its MLP, and GPT-2's two products that follow a norm."""
    x, scale = _empty(1, rows, 4096), _empty(4096)
    yield "rms_norm_linear", (x, scale, 1e-6, _empty(6144, 4096))
    yield "rms_norm_gated_mlp", (x, scale, 1e-6, _empty(2 * 14336, 4096), _empty(4096, 14336))
    x, vectors = _empty(1, rows, 768), (_empty(768), _empty(768))
    yield "layer_norm_linear", (x, *vectors, 1e-5, _empty(2304, 768), _empty(2304))
    yield "layer_norm_linear", (x, *vectors, 1e-5, _empty(3072, 768), _empty(3072), "gelu_tanh")


def launches(capability: int) -> Iterator[tuple[str, Any, int]]:
    from burnish.kernels.launch import Launch, Target, recording

    for rows in (1, 8, 16):
        for name, args in calls(rows):
            op = find_op(name)
            for impl in ("triton_gemv", "triton_skinny"):
                bound, recorded = op.bind(*args), list[Launch]()
                if [reason for reason in op.impls[impl].why_not(*bound) if "not on a CUDA device" not in reason]:
                    continue
                with recording(recorded.append, Target(divmod(capability, 10), SMS[capability])):
                    for config in op.impls[impl].configs(*bound):  # type: ignore[misc]
                        recorded.clear()
                        op.impls[impl].fn(*bound, config=config)
                        yield f"{name} {impl} {rows} rows {config}", recorded[0], capability


def compile_all(capabilities: tuple[int, ...]) -> list[dict[str, Any]]:
    jobs = {_key(job[1], job[2]): job for capability in capabilities for job in launches(capability)}
    return [_compiled(job) for job in jobs.values()]


if __name__ == "__main__":
    json.dump(compile_all(tuple(map(int, sys.argv[1:])) or CAPABILITIES), sys.stdout)
