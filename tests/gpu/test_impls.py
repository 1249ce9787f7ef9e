"""Every Impl of every Op on a real device, against the oracle."""

from __future__ import annotations

import pytest
import torch

from burnish.op import OPS, Op, Sample
from tests.ops.matrix import DTYPES, assert_impls

import burnish.ops  # noqa: F401 isort: skip

pytestmark = pytest.mark.gpu

CASES = [
    pytest.param(op, dtype, sample, id=f"{op.name}-{str(dtype)[6:]}-{sample.label}")
    for op in OPS.values()
    for dtype in DTYPES
    for sample in op.samples("cpu", dtype)
]


@pytest.mark.parametrize(("op", "dtype", "sample"), CASES)
def test_samples(op: Op, dtype: torch.dtype, sample: Sample) -> None:
    on_device = next(s for s in op.samples("cuda", dtype) if s.label == sample.label)
    # In float32 products are exact and slow, and have few configs.
    assert_impls(op, *on_device.args, every_config=dtype != torch.float32, **on_device.kwargs)
