"""Results that are looked up: just like those that torch works out, and only where calls are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from burnish.graph.results import Results, Unlike, compute, results_remembered

aten = torch.ops.aten


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def fake(mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
    """Of free sizes, but for the last."""
    dynamic = [*[DimDynamic.DYNAMIC] * (len(shape) - 1), DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    with unset_fake_temporarily():
        real = torch.empty(shape, dtype=dtype)
    return mode.from_tensor(real, symbolic_context=context)


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = [str(size) for size in (*value.shape, *value.stride(), value.storage_offset())]
        return sizes, value.dtype, value.device, value.requires_grad, value.is_contiguous()
    return [described(part) for part in value] if isinstance(value, (tuple, list)) else value


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


CALLS = {
    "new": (aten.mul.Tensor, lambda x: (x, x)),
    "broadcast": (aten.add.Tensor, lambda x: (x, x[:, :1])),
    "view": (aten.transpose.int, lambda x: (x, 0, 1)),
    "part": (aten.slice.Tensor, lambda x: (x, 2, 4)),
    "itself": (aten.contiguous.default, lambda x: (x,)),
    "other dtype": (aten.to.dtype, lambda x: (x, torch.float16)),
    "sizes": (aten.view.default, lambda x: (x, [x.shape[0], x.shape[1], 2, 4])),
    "list": (aten.cat.default, lambda x: ([x, x], -1)),
    "several": (aten.split_with_sizes.default, lambda x: (x, [2, 6], -1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_result_that_is_looked_up_is_like_the_first(name: str, mode: FakeTensorMode) -> None:
    func, arguments = CALLS[name]
    with mode:
        first = fake(mode, 3, 5, 8)
        second = first * 2  # of the same sizes, and elsewhere
        results = Results()
        made = func(*arguments(first))
        call = results.call(func, arguments(first), {})
        assert results.find(call) is None
        results.keep(call, made)
        again = results.call(func, arguments(second), {})
        found = results.find(again)
        assert found is not None
        looked_up = found.again(again)
        expected = func(*arguments(second))
    assert described(looked_up) == described(expected) == described(made)
    for mine, theirs in zip(*(v if isinstance(v, (list, tuple)) else [v] for v in (looked_up, expected)), strict=True):
        assert (storage(mine) == storage(second)) == (storage(theirs) == storage(second))
        assert (mine is second) == (theirs is second)
        assert storage(mine) != storage(first)


def test_what_is_unlike_is_not_looked_up(mode: FakeTensorMode) -> None:
    with mode:
        x = fake(mode, 3, 5, 8)
        results = Results()
        results.keep(results.call(aten.mul.Scalar, (x, 2), {}), x * 2)
        for other in ((x, 3), (x, 2.0), (x.transpose(0, 1), 2), (x.half(), 2), (x[:, 1:], 2), (fake(mode, 3, 5, 8), 2)):
            assert results.find(results.call(aten.mul.Scalar, other, {})) is None
        with torch.inference_mode():
            assert results.find(results.call(aten.mul.Scalar, (x, 2), {})) is None
        assert results.find(results.call(aten.mul.Scalar, (x * 1, 2), {})) is not None


def test_what_autograd_follows_is_not_kept(mode: FakeTensorMode) -> None:
    with mode:
        x = fake(mode, 3, 5, 8).requires_grad_()
        results = Results()
        call = results.call(aten.relu.default, (x,), {})
        results.keep(call, x.relu())
        assert results.find(call) is None


def test_calls_that_say_nothing_of_others(mode: FakeTensorMode) -> None:
    real = torch.ones(3)
    with mode:
        x = fake(mode, 3, 5, 8)
        for func, args in (
            (aten.add_.Tensor, (x, x)),  # changes its argument
            (aten.nonzero.default, (x,)),  # depends on values
            (torch.relu, (x,)),  # not an operator
            (aten.mul.Tensor, (real, real)),  # not fake
        ):
            with pytest.raises(Unlike):
                Results().call(func, args, {})
        with torch.autocast("cpu"), pytest.raises(Unlike):
            Results().call(aten.mul.Tensor, (x, x), {})
    with pytest.raises(Unlike):
        Results().call(aten.arange.default, (3,), {})  # no tensor says where it is


def test_sizes_that_turn_out_to_be_equal_keep_their_name(mode: FakeTensorMode) -> None:
    """Whichever symbol torch writes for both: what was found out with the first of them stays known."""
    with mode:
        x = fake(mode, 3, 5, 8)
        results = Results()
        results.keep(results.call(aten.relu.default, (x,), {}), x.relu())
        for _ in range(5):
            other = fake(mode, 3, 5, 8)
            assert results.find(results.call(aten.relu.default, (other,), {})) is None
            torch._check(other.shape[0] == x.shape[0])
            torch._check(other.shape[1] == x.shape[1])
            for tensor in (x, other):
                assert results.find(results.call(aten.relu.default, (tensor,), {})) is not None


def test_compute_remembers_within_the_with_only(mode: FakeTensorMode) -> None:
    with mode:
        x = fake(mode, 3, 5, 8)
        assert described(compute(aten.mul.Tensor, (x, x), {})) == described(x * x)
        with results_remembered():
            results = [compute(aten.mul.Tensor, (x, x), {}) for _ in range(2)]
            with results_remembered():
                results.append(compute(aten.mul.Tensor, (x, x), {}))
    assert len({storage(result) for result in results}) == 3
    assert all(described(result) == described(results[0]) for result in results)
