"""The one rule for "equal enough", for tests and `verify()` alike.

A result is right when its error against a float64 oracle is at most twice the error that eager PyTorch makes in the
same dtype, plus one rounding step: `error <= 2 * eager_error + eps(dtype) * max|oracle|`. In float32 it may be eight
times.

Errors are the largest absolute difference. A sum of products is as exact as its largest terms, so an entry that came
out near zero by cancellation has no relative accuracy to compare; the scale of the whole result has. The same must
hold of the mean absolute difference, with `mean|oracle|`: one outlier sets the largest error that is allowed in a
whole tensor, and would hide errors everywhere else. No tolerance is set by hand: eager says what the dtype can do on
these very inputs, the factor allows another order of summation, and the rounding step covers results that eager
happens to get exactly right.

Two is the factor of QuACK's tests: half-precision sums are accumulated in float32, and the rounding of the result
dominates. In float32 nothing is left but the order of summation, and that alone is worth more than two: oneDNN's
product has up to 4.7 times the error of MKL's (72 random ones, K from 64 to 16000), and MKL's own one row and many
differ as much. A wrong operator or a lower precision is off by a hundred times and more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_FACTORS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 8, torch.float64: 8}


@dataclass(frozen=True)
class Verdict:
    """What `check` found. `error` and `eager_error` are absolute, against the oracle; `reason` is one line when not ok.

    Of a result with several tensors it is the first wrong one's, else that which came closest to its limit.
    """

    ok: bool
    error: float
    eager_error: float
    allowed: float
    reason: str | None = None


def oracle(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn` in float64: floating tensors in the arguments (nested too) are upcast, the rest is left as it is."""
    args, kwargs = pytree.tree_map_only(Tensor, _to_float64, (args, kwargs))
    with torch.no_grad():
        return pytree.tree_map_only(Tensor, _to_float64, fn(*args, **kwargs))


def check(result: Any, eager: Any, oracle: Any) -> Verdict:
    """Judge `result` by the module's rule; `eager` is PyTorch's result in the same dtype, `oracle` the float64 one.

    All three are tensors or equal nestings of tensors; shapes and dtypes must be eager's. Integers and bools must be
    equal, infinities where the oracle (rounded to the dtype) has them, and NaN never passes.
    """
    results, spec = pytree.tree_flatten(result)
    eagers, eager_spec = pytree.tree_flatten(eager)
    oracles, oracle_spec = pytree.tree_flatten(oracle)
    if not spec == eager_spec == oracle_spec:
        return _wrong(f"the structure is {spec} where eager's is {eager_spec} and the oracle's {oracle_spec}")
    worst = Verdict(True, 0.0, 0.0, 0.0)
    for i, leaves in enumerate(zip(results, eagers, oracles, strict=True)):
        verdict = _check_leaf(*leaves)
        if not verdict.ok:
            where = f"result {i} of {len(results)}: " if len(results) > 1 else ""
            return Verdict(False, verdict.error, verdict.eager_error, verdict.allowed, f"{where}{verdict.reason}")
        if verdict.error * worst.allowed >= worst.error * verdict.allowed:
            worst = verdict
    return worst


def assert_close(result: Any, eager: Any, oracle: Any) -> None:
    """AssertionError with `check`'s reason when the result is not right."""
    verdict = check(result, eager, oracle)
    if not verdict.ok:
        raise AssertionError(verdict.reason)


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    outliers: float = 0.001,
) -> Tensor:
    """Normal random numbers of which a share of `outliers` (at least one) is 10 to 30 times as large.

    Real activations have such outliers, and uniform or small inputs hide overflow and cancellation. The same arguments
    give the same numbers on every device: they are drawn on the CPU in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if values.numel() and outliers > 0:
        count = max(1, int(values.numel() * outliers))
        where = torch.randint(values.numel(), (count,), generator=generator)
        values.view(-1)[where] *= 10 + 20 * torch.rand(count, generator=generator)
    return values.to(device=device, dtype=dtype)


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor


def _wrong(reason: str, error: float = float("inf"), eager_error: float = 0.0, allowed: float = 0.0) -> Verdict:
    return Verdict(False, error, eager_error, allowed, reason)


def _check_leaf(result: Any, eager: Any, oracle: Any) -> Verdict:
    if not isinstance(eager, Tensor):
        same = type(result) is type(eager) and result == eager
        return Verdict(True, 0.0, 0.0, 0.0) if same else _wrong(f"{result!r} where eager has {eager!r}")
    if not isinstance(result, Tensor) or not isinstance(oracle, Tensor):
        return _wrong(f"a {type(result).__name__} and an oracle {type(oracle).__name__} where eager has a tensor")
    if not result.shape == eager.shape == oracle.shape:
        shapes = [tuple(t.shape) for t in (result, eager, oracle)]
        return _wrong(f"the shape is {shapes[0]} where eager's is {shapes[1]} and the oracle's {shapes[2]}")
    if result.dtype != eager.dtype:
        return _wrong(f"the dtype is {result.dtype} where eager's is {eager.dtype}")
    result, eager, oracle = result.detach(), eager.detach().to(result.device), oracle.detach().to(result.device)
    if not result.is_floating_point():
        different = int((result != eager).sum())
        return (
            _wrong(f"{different} of {result.numel()} values differ from eager") if different else Verdict(True, 0, 0, 0)
        )
    return _check_floats(result, eager, oracle)


def _check_floats(result: Tensor, eager: Tensor, oracle: Tensor) -> Verdict:
    new, old, true = result.double(), eager.double(), oracle.double()
    for name, values in (("the result", new), ("the oracle", true)):
        if nans := int(values.isnan().sum()):
            return _wrong(f"{nans} of {values.numel()} values of {name} are NaN")
    # What is beyond the dtype's range is infinity in it: there is no finite value to be near to.
    rounded = true.to(result.dtype).double()
    finite = rounded.isfinite()
    if wrong := int(((new != rounded) & (new.isinf() | ~finite)).sum()):
        return _wrong(f"{wrong} of {new.numel()} values are infinite or finite where the oracle is not so")
    if not bool(finite.any()):
        return Verdict(True, 0.0, 0.0, 0.0)
    new, old, true = new[finite], old[finite], true[finite]
    usable = old.isfinite()  # where eager itself overflows, it says nothing about what the dtype can do
    errors, eager_errors, scales = (new - true).abs(), (old - true)[usable].abs(), true.abs()
    if not eager_errors.numel():
        eager_errors = scales.new_zeros(1)
    verdicts = []
    for kind, of in (("largest", torch.max), ("mean", torch.mean)):
        error, eager_error = float(of(errors)), float(of(eager_errors))
        allowed = _FACTORS.get(result.dtype, 2) * eager_error + torch.finfo(result.dtype).eps * float(of(scales))
        if error > allowed:
            at = int(errors.argmax())
            return _wrong(
                f"the {kind} error is {error:.3g} where {allowed:.3g} is allowed (eager's is {eager_error:.3g}); "
                f"furthest off is {float(new[at]):.6g} where the oracle has {float(true[at]):.6g}",
                error,
                eager_error,
                allowed,
            )
        verdicts.append(Verdict(True, error, eager_error, allowed))
    return verdicts[0]
