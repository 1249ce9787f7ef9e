"""Every Triton Impl on its Op's samples, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle
from burnish.op import OPS, Op, Sample
from tests.ops.matrix import DTYPES

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")


def is_slow(dtype: torch.dtype, sample: Sample) -> bool:
    """A model's sizes once, and each feature in two dtypes, are enough for each change."""
    return dtype == torch.float16 or (dtype == torch.float32 and sample.label[0].isdigit())


CASES = [
    pytest.param(
        *(op, impl, dtype, sample),
        id=f"{op.name}-{impl}-{str(dtype)[6:]}-{sample.label}",
        marks=pytest.mark.slow if is_slow(dtype, sample) else (),
    )
    for op in OPS.values()
    for impl in op.impls
    if impl.startswith("triton")
    for dtype in DTYPES
    for sample in op.samples("cpu", dtype)
]


@pytest.mark.parametrize(("op", "impl", "dtype", "sample"), CASES)
def test_samples(op: Op, impl: str, dtype: torch.dtype, sample: Sample) -> None:
    bound = op.bind(*sample.args, **sample.kwargs)
    reasons = [reason for reason in op.impls[impl].why_not(*bound) if "not on a CUDA device" not in reason]
    if reasons:
        return  # it does not claim the case
    versions = [a._version for a in bound if isinstance(a, Tensor)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result = op.impls[impl].fn(*bound)
    finally:
        torch.use_deterministic_algorithms(False)
    eager = op.reference(*bound)
    assert_close(result, eager, oracle(op.reference, *bound))
    assert versions == [a._version for a in bound if isinstance(a, Tensor)], "an input was written to"
