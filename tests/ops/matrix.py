"""Every Impl of an Op against the numerics rule, on one set of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle
from burnish.op import Impl, Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(value: Any) -> list[Tensor]:
    """A result's tensors, whether it is one or several."""
    return list(value) if isinstance(value, tuple) else [value]


def assert_impls(op: Op, *args: Any, every_config: bool = False, **kwargs: Any) -> list[str]:
    """Run every Impl that takes the inputs, and the Op itself, on poisoned memory; returns the names of those that ran.
    Each with its first config, or with `every_config` with all that it has.

    Checked are the numbers, the layout in memory (the reference's), that no input was written to, and that no result
    shares memory with an input.
    """
    bound = op.bind(*args, **kwargs)
    eager, truth = op.reference(*bound), oracle(op.reference, *bound)
    ran = [name for name, impl in op.impls.items() if not impl.why_not(*bound)]
    runs = [run for name in ran for run in _runs(op.impls[name], bound, every_config)]
    for name, run in [*runs, ("the Op itself", op)]:
        versions = [a._version for a in bound if isinstance(a, Tensor)]
        with _poisoned_memory():
            result = run(*bound)
        try:
            assert_close(result, eager, truth)
        except AssertionError as error:
            raise AssertionError(f"{op.name} by {name}: {error}") from None
        assert versions == [a._version for a in bound if isinstance(a, Tensor)], f"{name} wrote to an input"
        assert [_layout(t) for t in tensors(result)] == [_layout(t) for t in tensors(eager)], f"{name}: another layout"
        assert not _storages(tensors(result)) & _storages(bound), f"{name} returned an input's memory"
    return ran


def _runs(impl: Impl, args: Any, every_config: bool) -> list[tuple[str, Callable[..., Any]]]:
    if impl.configs is None or not every_config:
        return [(impl.name, impl.fn)]
    return [(f"{impl.name} {config}", partial(impl.fn, config=config)) for config in impl.configs(*args)]


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, without the strides of dimensions that have one entry: those mean nothing."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(tensor.shape), tuple(stride for size, stride in strides if size > 1)


def _storages(values: Any) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in values if isinstance(v, Tensor) and v.numel()}


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors start as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
