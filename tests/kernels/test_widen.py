"""The instructions that widen weights of 8 and 4 bits, run as PTX defines them: every number in every place."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from burnish.quantize import dequantize

pytest.importorskip("triton")

from burnish.kernels import widen

PROGRAMS = [
    ("int8", torch.bfloat16, widen.INT8_BFLOAT16),
    ("int8", torch.float16, widen.INT8_FLOAT16),
    ("fp8", torch.bfloat16, widen.FP8_BFLOAT16),
    ("fp8", torch.float16, widen.FP8_FLOAT16),
    ("int4", torch.bfloat16, widen.INT4_BFLOAT16),
    ("int4", torch.float16, widen.INT4_FLOAT16),
]
HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def _fma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Of both halves; exact in float64, then rounded once."""

    def floats(x: Tensor) -> Tensor:
        return torch.stack((x & 0xFFFF, x >> 16), -1).to(torch.int16).view(dtype).double()

    halves = (floats(a) * floats(b) + floats(c)).to(dtype).view(torch.int16).long() & 0xFFFF
    return halves[..., 0] | halves[..., 1] << 16


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """Three bits are the place in the table of what becomes of them."""
    out = torch.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & 0xFFFFFFFF


def run(program: str, words: Tensor) -> Tensor:
    """What it makes of words, given and held as int64: (words, results), 16 bits each."""
    results = len(set(re.findall(r"\$\d+", program))) - 1
    held = {f"${results}": words}

    def value(operand: str) -> Tensor:
        return held[operand] if operand in held else torch.full_like(words, int(operand, 0))

    for line in program.strip("{}\n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        to, *operands = re.findall(r"\{.*?\}|[^\s,]+", rest) or [""]
        if operation == "mov.b32" and to.startswith("{"):
            low, high = re.findall(r"\$\d+", to)
            held[low], held[high] = value(operands[0]) & 0xFFFF, value(operands[0]) >> 16
        elif operation == "mov.b32":
            held[to] = value(operands[0])
        elif operation == "shr.u32":
            held[to] = value(operands[0]) >> int(operands[1])
        elif operation == "shl.b32":
            held[to] = value(operands[0]) << int(operands[1]) & 0xFFFFFFFF
        elif operation == "lop3.b32":
            held[to] = _lop3(*map(value, operands[:3]), int(operands[3], 0))
        elif operation.startswith("fma.rn."):
            held[to] = _fma(*map(value, operands), HALVES[operation.removeprefix("fma.rn.")])
        else:
            assert operation in ("", ".reg"), operation
    return torch.stack([held[f"${i}"] for i in range(results)], -1)


def _words(kind: str) -> Tensor:
    """(words, 4 bytes): each byte in each place, the others random; of int4 these are both halves."""
    octets = torch.arange(256).to(torch.uint8)
    if kind == "fp8":
        octets[[0x7F, 0xFF]] = 0  # NaN, which no weight has
    words = octets[torch.randint(256, (4, 256, 4), generator=torch.Generator().manual_seed(0))]
    for place in range(4):
        words[place, :, place] = octets
    return words.flatten(0, 1)


@pytest.mark.parametrize(("kind", "dtype", "program"), PROGRAMS)
def test_every_number_in_every_place(kind: str, dtype: torch.dtype, program: object) -> None:
    data = _words(kind)
    stored = data.view(torch.int8) if kind == "int8" else data
    scales = torch.ones(len(data), 1) if kind == "int4" else torch.ones(len(data))
    expected = dequantize(stored, scales, None, kind, dtype).view(torch.int16)
    found = run(str(getattr(program, "value", program)), data.view(torch.int32)[:, 0].long() & 0xFFFFFFFF)
    assert torch.equal(found.to(torch.int16), expected), "bits, so that the sign of zero counts"


def test_how_many_instructions_a_word_takes() -> None:
    """But for constants, and the splitting of pairs, which are two registers' halves already."""
    counts = [len(re.findall(r"(?m)^(?:shr|shl|lop3|fma)\.", str(program.value))) for _, _, program in PROGRAMS]
    assert counts == [7, 5, 9, 9, 11, 11]
