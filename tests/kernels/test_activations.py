"""Activations inside kernels, range by range: over all of a product's values an error at small ones is not seen."""

from __future__ import annotations

import pytest
import torch

from burnish.numerics import assert_close
from burnish.ops._activations import ACTIVATIONS, activate_

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from burnish.kernels.activations import activate, in_half  # noqa: E402

COUNT = 2048


@triton.jit
def _kernel(x, out, ACTIVATION: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    result = activate(tl.load(x + places).to(tl.float32), ACTIVATION)
    tl.store(out + places, result.to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_every_range(activation: str, dtype: torch.dtype) -> None:
    for low, high in ((-12, -6), (-6, -4), (-4, -3), (-3, -2), (-2, -1), (-1, 0), (0, 1), (1, 4), (4, 12)):
        x = torch.linspace(low, high, COUNT).to(dtype)
        out = torch.full_like(x, torch.nan)
        _kernel[(1,)](x, out, in_half(activation, dtype), COUNT)
        assert_close(out, activate_(x.clone(), activation), activate_(x.double(), activation))
