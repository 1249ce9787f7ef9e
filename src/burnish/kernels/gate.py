"""`act(gate) * up` of the two halves of a product's columns: the pass between two products that torch computes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import activate, in_half
from burnish.kernels.launch import (
    Config,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    wait_for_inputs,
)


@triton.jit
def gate_kernel(
    gate_up_ptr,  # (rows, 2 * columns)
    out_ptr,  # (rows, columns)
    columns,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Block `program_id(0)`, counted row by row."""
    launch_dependents(PDL)
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else column < columns
    gates = gate_up_ptr + row * (2 * columns) + column
    wait_for_inputs(PDL)
    # Both halves are dead after this: they leave the cache before anything else does.
    gate = tl.load(gates, mask).to(tl.float32)
    up = tl.load(gates + columns, mask).to(tl.float32)
    result = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * columns + column, result.to(out_ptr.dtype.element_ty), mask)


def gate_configs(columns: int) -> list[Config]:
    """Configs of `gate` for rows of `columns` results, the most promising first."""
    # Loads of 16 bytes of a half type, two of each half in flight in every thread, or one.
    shapes = [(2048, 4), (1024, 4)]
    longest = max(32, next_power_of_2(columns))
    return list(dict.fromkeys(Config.of(num_warps=warps, BLOCK=min(block, longest)) for block, warps in shapes))


def gate(gate_up: Tensor, activation: str, config: Config | None = None) -> Tensor:
    """`act(gate_up[..., :I]) * gate_up[..., I:]` of gate_up (..., 2*I), as a contiguous (..., I).

    Dtypes: float16, bfloat16 or float32; computed in float32 and rounded once. gate_up is copied first where it is not
    contiguous. `activation` is one that `activate` knows.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    columns = gate_up.shape[-1] // 2
    config = config or first_config(gate_configs, columns)
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty((*gate_up.shape[:-1], columns))
    constants: dict[str, Any] = {
        "ACTIVATION": in_half(activation, gate_up.dtype),
        "EVEN": columns % config["BLOCK"] == 0,
    }
    programs = gate_up.numel() // (2 * columns) * cdiv(columns, config["BLOCK"])
    launch(gate_kernel, (programs,), gate_up, out, columns, config=config, like=gate_up, **constants)
    return out
