"""The instructions that widen weights of 8 and 4 bits, run as PTX defines them: every number in every place."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from burnish.quantize import dequantize

pytest.importorskip("triton")

from burnish.kernels import widen
from tests.kernels.ptx import run

PROGRAMS = [
    ("int8", torch.bfloat16, widen.INT8_BFLOAT16, 64),
    ("int8", torch.float16, widen.INT8_FLOAT16, 1),
    ("fp8", torch.bfloat16, widen.FP8_BFLOAT16, 1),
    ("fp8", torch.float16, widen.FP8_FLOAT16, 1),
    ("int4", torch.bfloat16, widen.INT4_BFLOAT16, 4),
    ("int4", torch.float16, widen.INT4_FLOAT16, 1),
]


def _words(kind: str) -> Tensor:
    """(words, 4 bytes): each byte in each place, the others random; of int4 these are both halves."""
    octets = torch.arange(256).to(torch.uint8)
    if kind == "fp8":
        octets[[0x7F, 0xFF]] = 0  # NaN, which no weight has
    words = octets[torch.randint(256, (4, 256, 4), generator=torch.Generator().manual_seed(0))]
    for place in range(4):
        words[place, :, place] = octets
    return words.flatten(0, 1)


def _as_words(data: Tensor) -> Tensor:
    return data.view(torch.int32)[:, 0].long() & 0xFFFFFFFF


def _parts(words: Tensor, bits: int) -> Tensor:
    """(..., results) as (..., entries), from a word's lowest bits on."""
    parts = torch.stack([words >> start & (1 << bits) - 1 for start in range(0, 32, bits)], -1)
    return parts.flatten(-2)


@pytest.mark.parametrize(("kind", "dtype", "program", "factor"), PROGRAMS)
def test_every_number_in_every_place(kind: str, dtype: torch.dtype, program: object, factor: int) -> None:
    data = _words(kind)
    stored = data.view(torch.int8) if kind == "int8" else data
    scales = torch.ones(len(data), 1) if kind == "int4" else torch.ones(len(data))
    expected = (dequantize(stored, scales, None, kind, dtype) / factor).view(torch.int16)
    found = _parts(run(program, 4 if kind == "int4" else 2, _as_words(data)), 16)
    assert torch.equal(found.to(torch.int16), expected), "bits, so that the sign of zero counts"
    assert widen.factor_of.fn(kind, getattr(widen.gl, str(dtype).removeprefix("torch."))) == factor


def test_every_half_of_a_byte_as_an_integer() -> None:
    data = _words("int4")
    found = _parts(run(widen.INT4_OCTETS, 2, _as_words(data)), 8).to(torch.int8)
    expected = torch.cat(((data & 15), (data >> 4)), -1).to(torch.int8) - 8
    assert torch.equal(found, expected * 16)


def test_how_many_instructions_a_word_takes() -> None:
    def count(program: object) -> int:
        """But for constants."""
        return len(re.findall(r"(?m)^(?:shr|shl|lop3|fma)\.", str(getattr(program, "value", program))))

    assert [count(program) for _, _, program, _ in PROGRAMS] == [5, 5, 9, 9, 9, 9]
    assert count(widen.INT4_OCTETS) == 3
