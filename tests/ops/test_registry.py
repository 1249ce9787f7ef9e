"""What every Op must have, and every Impl on the Op's own samples."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import burnish.ops
from burnish.op import OPS, Cost, Op, Sample
from tests.ops.matrix import DTYPES, assert_impls, tensors

ALL = [OPS[name] for name in burnish.ops.__all__]
NAMES = burnish.ops.__all__


def test_every_op_is_exported() -> None:
    assert {name for name in OPS if not name.startswith("toy_")} == set(NAMES)
    assert all(getattr(burnish.ops, name) is OPS[name] for name in NAMES)


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_the_docstring_says_what_one_must_know(op: Op) -> None:
    assert op.__doc__ is not None
    for word in ("Shapes:", "Dtypes:", "Errors:", "Source:", "float"):
        assert word in op.__doc__, f"{op.name}'s docstring has no {word}"


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_there_is_a_cost_and_enough_samples(op: Op) -> None:
    samples = list(op.samples("cpu", torch.float32))
    assert len(samples) >= 5
    assert len({s.label for s in samples}) == len(samples)
    for sample in samples:
        cost, half = (op.cost(*s.args, **s.kwargs) for s in (sample, _matching(op, sample.label, torch.bfloat16)))
        assert isinstance(cost, Cost)
        assert cost.flops > 0
        assert cost.flops == half.flops
        assert cost.bytes > half.bytes > 0


def _matching(op: Op, label: str, dtype: torch.dtype) -> Sample:
    return next(s for s in op.samples("cpu", dtype) if s.label == label)


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_samples_have_the_dtype_asked_for_and_are_the_same_each_time(op: Op) -> None:
    first, again = (list(op.samples("cpu", torch.bfloat16)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        for a, b in zip(op.bind(*one.args, **one.kwargs), op.bind(*other.args, **other.kwargs), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in one.args)


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_impls_are_described_and_take_the_ops_arguments(op: Op) -> None:
    assert list(op.impls)[-1] == "reference"
    for impl in op.impls.values():
        assert impl.description
        parameters = dict(inspect.signature(impl.fn).parameters)
        assert (impl.configs is not None) == (parameters.pop("config", None) is not None), impl.name
        assert impl.live_rows == (parameters.pop("live_rows", None) is not None), impl.name
        assert [(p.name, p.default) for p in parameters.values()] == [
            (p.name, p.default) for p in op.signature.parameters.values()
        ], impl.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_every_impl_agrees_on_the_samples(op: Op, dtype: torch.dtype) -> None:
    ran = {name for s in op.samples("cpu", dtype) for name in assert_impls(op, *s.args, **s.kwargs)}
    assert ran - {"reference"}, f"no Impl of {op.name} but the reference takes any sample in {dtype}"


@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_the_empty_results_for_tracing_are_like_the_references(op: Op) -> None:
    for sample in op.samples("cpu", torch.float16):
        bound = op.bind(*sample.args, **sample.kwargs)
        for empty, real in zip(tensors(op.shape(*bound)), tensors(op.reference(*bound)), strict=True):
            assert (empty.shape, empty.dtype) == (real.shape, real.dtype), sample.label
            assert empty.squeeze().stride() == real.squeeze().stride(), sample.label
