"""The kernel that writes a weight of 8 or 4 bits out, on a real device: PyTorch's numbers, to the last bit."""

from __future__ import annotations

import pytest
import torch

from burnish.numerics import randn
from burnish.quantize import KINDS, Kind, quantize_weight
from tests.ops.matrix import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_every_config_gives_the_same_numbers(kind: Kind, scale_dtype: torch.dtype) -> None:
    from burnish.kernels.dequantize import dequantize_configs, dequantize_weight

    for rows, columns in ((517, 4096), (33, 384), (3, 14336)):
        wide = randn(rows, columns, device="cuda") / columns**0.5
        for symmetric in (True, False):
            q = quantize_weight(wide, kind, 64, symmetric=symmetric, search=False, scale_dtype=scale_dtype)
            stored = (q.data, q.scales, q.zeros, kind)
            for dtype in DTYPES:
                expected = q.dequantize(dtype)
                for config in dequantize_configs(q.data, q.scales, kind):
                    assert torch.equal(dequantize_weight(*stored, dtype, config=config), expected), str(config)
