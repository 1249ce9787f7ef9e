"""Every Triton Impl on its Op's samples, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle
from burnish.op import OPS, Op, Sample
from tests.ops.matrix import DTYPES

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")


def claims(op: Op, impl: str, sample: Sample) -> bool:
    reasons = op.impls[impl].why_not(*op.bind(*sample.args, **sample.kwargs))
    return not [reason for reason in reasons if "not on a CUDA device" not in reason]


def cases() -> Iterator[Any]:
    """Each sample in each dtype. Of an Impl's samples one is fast in bfloat16, the next one in float32, and so on; a
    model's sizes, and what float32 is not for, in bfloat16."""
    for op in OPS.values():
        samples = {dtype: list(op.samples("cpu", dtype)) for dtype in DTYPES}
        for impl in (name for name in op.impls if name.startswith("triton")):
            for i, narrow in enumerate(samples[torch.bfloat16]):
                wide = i % 2 == 1 and not narrow.label[0].isdigit() and claims(op, impl, samples[torch.float32][i])
                fast = torch.float32 if wide else torch.bfloat16
                for dtype in DTYPES:
                    yield pytest.param(
                        *(op, impl, dtype, samples[dtype][i]),
                        id=f"{op.name}-{impl}-{str(dtype)[6:]}-{narrow.label}",
                        marks=() if dtype == fast else pytest.mark.slow,
                    )


@pytest.mark.parametrize(("op", "impl", "dtype", "sample"), cases())
def test_samples(op: Op, impl: str, dtype: torch.dtype, sample: Sample) -> None:
    if not claims(op, impl, sample):
        return
    bound = op.bind(*sample.args, **sample.kwargs)
    versions = [a._version for a in bound if isinstance(a, Tensor)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result = op.impls[impl].fn(*bound)
    finally:
        torch.use_deterministic_algorithms(False)
    eager = op.reference(*bound)
    assert_close(result, eager, oracle(op.reference, *bound))
    assert versions == [a._version for a in bound if isinstance(a, Tensor)], "an input was written to"
