"""The instructions that make digits of x, run as PTX defines them: every number of 16 bits in every place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import digits
from tests.kernels.ptx import run

PROGRAMS = [
    (torch.bfloat16, digits.INT8_BFLOAT16, digits.INT8_ORDER),
    (torch.float16, digits.INT8_FLOAT16, digits.INT8_ORDER),
    (torch.bfloat16, digits.INT4_BFLOAT16, digits.INT4_ORDER),
    (torch.float16, digits.INT4_FLOAT16, digits.INT4_ORDER),
]


@pytest.mark.parametrize(("dtype", "program", "order"), PROGRAMS)
@pytest.mark.parametrize("exponent", [-4, 15])
def test_every_number_in_every_place(
    dtype: torch.dtype, program: object, order: tuple[int, ...], exponent: int
) -> None:
    """Of those below 2 ** (exponent + 1), times what makes that 2 ** 21."""
    patterns = torch.arange(1 << 16).to(torch.int16)
    numbers = patterns.view(dtype).double()
    below = numbers.abs() < 2.0 ** (exponent + 1)  # false for NaN
    generator = torch.Generator().manual_seed(0)
    columns = torch.stack([patterns[below][torch.randperm(int(below.sum()), generator=generator)] for _ in range(8)], 1)

    scale = torch.tensor(2.0 ** (20 - exponent)).view(torch.int32).long()
    words = (columns.view(torch.int32).long() & 0xFFFFFFFF).unbind(-1)
    found = run(program, 6, *words, scale.expand_as(words[0]))
    octets = torch.stack([found >> 8 * i & 255 for i in range(4)], -1).to(torch.int8).long()
    high, middle, low = octets.view(-1, 3, 8).unbind(1)
    expected = (columns.view(dtype).double() * 2.0 ** (20 - exponent)).round()
    assert torch.equal((high * 65536 + middle * 256 + low).double(), expected[:, list(order)])
