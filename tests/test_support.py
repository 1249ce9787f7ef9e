"""Which Impls run on a device: what `why_not` says of every sample, summed up."""

from __future__ import annotations

import pytest
import torch

from burnish.op import OPS
from burnish.support import ImplSupport, _most_telling, impl_support


@pytest.fixture(scope="module")
def here() -> dict[tuple[str, str], ImplSupport]:
    return {(found.op, found.impl): found for found in impl_support("cpu")}


def test_every_impl_of_every_op_is_asked(here: dict[tuple[str, str], ImplSupport]) -> None:
    assert list(here) == [(name, impl) for name in sorted(OPS) for impl in OPS[name].impls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_impl_runs_in_the_dtypes_in_which_it_takes_a_sample(
    here: dict[tuple[str, str], ImplSupport], dtype: torch.dtype
) -> None:
    for name, op in OPS.items():
        samples = list(op.samples("cpu", dtype))
        for impl in op.impls.values():
            taken = any(not impl.why_not(*sample.args, **sample.kwargs) for sample in samples)
            assert (str(dtype).removeprefix("torch.") in here[name, impl.name].dtypes) == taken


def test_reasons_are_given_where_it_does_not_run(here: dict[tuple[str, str], ImplSupport]) -> None:
    assert all(found.runs == (not found.reasons) for found in here.values())


def test_the_reference_runs_everywhere(here: dict[tuple[str, str], ImplSupport]) -> None:
    assert all(here[name, "reference"].dtypes == ("float32", "bfloat16", "float16") for name in OPS)


def test_the_reason_is_the_device_and_no_samples_shape(here: dict[tuple[str, str], ImplSupport]) -> None:
    assert here["linear", "triton_gemv"].reasons == ("the inputs are on cpu, not on a CUDA device",)


def test_without_a_common_reason_the_nearest_sample_tells() -> None:
    assert _most_telling([["here", "8 rows"], ["float32", "here"]]) == ["here"]
    assert _most_telling([["float32", "8 rows"], ["9 rows"]]) == ["9 rows"]
    assert _most_telling([["float32"], ["no float16 here"]]) == ["no float16 here"]
