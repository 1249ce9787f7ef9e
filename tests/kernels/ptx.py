"""A few instructions of PTX as its specification defines them, on `torch` tensors: those of inline assembly."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

_HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
_WORD = 0xFFFFFFFF


def _split(x: Tensor, bits: int) -> Tensor:
    return torch.stack([x >> start & (1 << bits) - 1 for start in range(0, 32, bits)], -1)


def _join(parts: Tensor) -> Tensor:
    bits = 32 // parts.shape[-1]
    return sum(part << bits * i for i, part in enumerate(parts.unbind(-1)))  # type: ignore[return-value]


def _fma(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Exact in float64, as the numbers here are, then rounded once."""
    bits, integers = (32, torch.int32) if dtype == torch.float32 else (16, torch.int16)

    def operate(*operands: Tensor) -> Tensor:
        a, b, c = (_split(x, bits).to(integers).view(dtype).double() for x in operands)
        return _join((a * b + c).to(dtype).view(integers).long() & (1 << bits) - 1)

    return operate


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Three bits are the place in the table of what becomes of them."""
    out = torch.zeros_like(a)
    for i in range(8):
        if int(table.flatten()[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & _WORD


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    octets = torch.cat((_split(a, 8), _split(b, 8)), -1)
    return _join(octets.gather(-1, _split(selector, 4)[..., :4]))


def _float32(half: Tensor) -> Tensor:
    return half.to(torch.int16).view(torch.float16).float().view(torch.int32).long() & _WORD


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & _WORD,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b & _WORD,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "cvt.f32.f16": _float32,
    "fma.rn.f32": _fma(torch.float32),
} | {f"fma.rn.{name}": _fma(dtype) for name, dtype in _HALVES.items()}


def run(program: object, results: int, *inputs: Tensor) -> Tensor:
    """What inline assembly makes of words, each an int64 from 0 on: (..., results). `$0` to `$results` are results,
    then come inputs."""
    text = str(getattr(program, "value", program))
    held = {f"${results + i}": words for i, words in enumerate(inputs)}

    def value(operand: str) -> Tensor:
        if operand in held:
            return held[operand]
        literal = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return torch.full_like(inputs[0], literal)

    for line in text.strip("{}\n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        to, *operands = re.findall(r"\{.*?\}|[^\s,]+", rest)
        if to.startswith("{"):
            low, high = re.findall(r"\w+", to)
            held[low], held[high] = _split(value(operands[0]), 16).unbind(-1)
        else:
            held[to] = _OPERATIONS[operation](*map(value, operands))
    return torch.stack([held[f"${i}"] for i in range(results)], -1)
