"""Triton's interpreter as the tests run it computes what it did, and leaves the language as it was."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language import core  # noqa: E402

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


@triton.jit
def _combine(x, y, OPERATION: tl.constexpr):
    if OPERATION == "add":
        return x + y
    elif OPERATION == "sub":
        return x - y
    else:
        return x * y


@triton.jit
def _kernel(x, y, out, OPERATION: tl.constexpr):
    places = tl.arange(0, 2)
    tl.store(out + places, _combine(tl.load(x + places), tl.load(y + places), OPERATION))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_integers_are_what_they_were(operation: str, dtype: torch.dtype) -> None:
    x, y = torch.tensor([4, torch.iinfo(dtype).max], dtype=dtype), torch.tensor([3, 2], dtype=dtype)
    out = torch.empty_like(x)
    _kernel[(1,)](x, y, out, operation)
    assert torch.equal(out, getattr(torch, operation)(x, y))


@INTERPRETED
def test_the_language_is_as_it_was_after_a_kernel() -> None:
    before = {name: getattr(tl, name) for name in ("range", "arange", "load", "static_assert")}
    x = torch.tensor([1, 2])
    _kernel[(1,)](x, x, torch.empty_like(x), "add")
    assert all(getattr(tl, name) is value for name, value in before.items())
    assert core.is_builtin(tl.load)
