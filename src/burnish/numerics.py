"""The one rule for "equal enough", for tests and `verify()` alike.

A result is right when its error against a float64 oracle is at most twice the error that eager PyTorch makes in the
same dtype, plus one rounding step: `error <= 2 * eager_error + eps(dtype) * max|oracle|`. In float32 it may be 16
times.

What counts of eager's error is the largest, and for entries that are larger than the rest also the largest relative to
their magnitude (plus the root mean square of the whole): a sum is as exact as its largest terms, so an entry near zero
has no accuracy of its own, and eager's luck on a single outlier must not fail another result (MiniLM has one activation
of 165 among values of about 1). The same must hold of the mean absolute error, with `mean|oracle|`: an outlier makes
the rounding step large, and would hide a wrong operator everywhere else. No tolerance is set by hand: eager says what
the dtype can do on these very inputs, the factor allows another order of summation, and the rounding step covers
results that eager happens to get exactly right.

Two is the factor of QuACK's tests: half-precision sums are accumulated in float32, and the rounding of the result
dominates. In float32 nothing is left but the order of summation, and that alone is worth more than two: oneDNN's
product has up to 4.7 times the error of MKL's (72 random ones, K from 64 to 16000), and MKL's own one row and many
differ as much. PyTorch's memory-efficient attention, which puts a float32 product together from three of TF32, has
up to 8.6 times the error of plain products (13 inputs on an H200). A wrong operator or a lower precision is off by a
hundred times and more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_CHUNK = 1 << 18
_MANY = 64  # the largest of so many errors is no luck
_TINY = torch.finfo(torch.float64).tiny
_FACTORS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 16, torch.float64: 16}


@dataclass(frozen=True)
class Verdict:
    """What `check` found. Errors are absolute, of the entry that came closest to what is allowed for it (or of the
    mean); `reason` is one line when not ok.

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


def check(result: Any, eager: Any, oracle: Any, computed_in: torch.dtype | None = None) -> Verdict:
    """Judge `result` by the module's rule; `eager` is PyTorch's result in the same dtype, `oracle` the float64 one.

    `computed_in` is what results come from, where that is a lower precision than they have: under autocast a loss is
    float32 by its dtype alone, and eager's error of the one number may be anything, also nothing. Of few numbers the
    rounding step is then that of `computed_in`, and the factor.

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
        verdict = _check_leaf(*leaves, computed_in)
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


def _check_leaf(result: Any, eager: Any, oracle: Any, computed_in: torch.dtype | None) -> Verdict:
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
    return _check_floats(result, eager, oracle, _precision_of(result, computed_in))


def _precision_of(result: Tensor, computed_in: torch.dtype | None) -> torch.dtype:
    """Of many numbers eager's errors tell it."""
    if computed_in is None or result.numel() >= _MANY or torch.finfo(computed_in).eps <= torch.finfo(result.dtype).eps:
        return result.dtype
    return computed_in


def _check_floats(result: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> Verdict:
    for name, values in (("the result", result), ("the oracle", oracle)):
        if not _is_finite(values) and (nans := int(values.isnan().sum())):
            return _wrong(f"{nans} of {values.numel()} values of {name} are NaN")
    parts = _Parts(result, eager, oracle)
    totals = _Totals()
    for part in parts:
        totals.add(part)
    if totals.wrongly_infinite:
        return _wrong(
            f"{totals.wrongly_infinite} of {result.numel()} values are infinite or finite where the oracle is not so"
        )
    if not totals.count:
        return Verdict(True, 0.0, 0.0, 0.0)
    rms, step, factor = totals.rms, torch.finfo(dtype).eps, _FACTORS.get(dtype, 2)
    eager_error = max(part.eager_error(rms) for part in parts)
    closest, ratio, furthest = Verdict(True, 0.0, 0.0, 0.0), -1.0, ""
    for part in parts:
        if not part.true.numel():
            continue
        error = part.error
        eagers = (eager_error * part.scale(rms)).clamp_min(totals.eager_largest)
        allowed = factor * eagers + step * totals.largest
        ratios = error / allowed.clamp_min(_TINY)
        at = int(ratios.argmax())
        if float(ratios[at]) > ratio:
            ratio = float(ratios[at])
            closest = Verdict(ratio <= 1, float(error[at]), float(eagers[at]), float(allowed[at]))
            furthest = f"; it is {float(part.new[at]):.6g} where the oracle has {float(part.true[at]):.6g}"
    mean, eager_mean = totals.error / totals.count, totals.eager_error / max(totals.usable, 1)
    allowed_mean = factor * eager_mean + step * totals.magnitude / totals.count
    for kind, verdict, where in (
        ("largest", closest, furthest),
        ("mean", Verdict(mean <= allowed_mean, mean, eager_mean, allowed_mean), ""),
    ):
        if not verdict.ok:
            return _wrong(
                f"the {kind} error is {verdict.error:.3g} where {verdict.allowed:.3g} is allowed "
                f"(eager's is {verdict.eager_error:.3g}){where}",
                verdict.error,
                verdict.eager_error,
                verdict.allowed,
            )
    return closest


def _is_finite(values: Tensor, largest: float = math.inf) -> bool:
    """Whether there is neither NaN nor infinity nor anything beyond `largest` in it, in one pass over it (`isfinite`
    takes six)."""
    if not values.numel():
        return True
    low, high = map(float, values.aminmax())  # NaN where there is one
    return math.isfinite(low) and math.isfinite(high) and -largest <= low and high <= largest


@dataclass(frozen=True)
class _Errors:
    """One chunk in float64: what is finite of the result and the oracle, eager with what is not as NaN."""

    new: Tensor
    old: Tensor
    true: Tensor
    wrongly_infinite: int

    @staticmethod
    def of(result: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> _Errors:
        new, old, true = result.double(), eager.double(), oracle.double()
        if _is_finite(true, torch.finfo(dtype).max) and _is_finite(new):
            return _Errors(new, old, true, 0)
        # What is beyond the dtype's range is infinity in it: there is no finite value to be near to.
        rounded = true.to(dtype).double()
        finite = rounded.isfinite()
        wrong = int(((new != rounded) & (new.isinf() | ~finite)).sum())
        return _Errors(new[finite], old[finite], true[finite], wrong)

    @functools.cached_property
    def error(self) -> Tensor:
        return (self.new - self.true).abs()

    @functools.cached_property
    def magnitude(self) -> Tensor:
        return self.true.abs()

    @functools.cached_property
    def eager_errors(self) -> Tensor:
        """Not finite where eager is not."""
        return (self.old - self.true).abs()

    @functools.cached_property
    def usable(self) -> Tensor | None:
        """Where eager is finite; None: everywhere."""
        return None if _is_finite(self.old) else self.old.isfinite()

    def scale(self, rms: float) -> Tensor:
        return self.magnitude + rms

    def eager_error(self, rms: float) -> float:
        """Eager's largest error on that scale. Where eager itself overflows, it says nothing about the dtype."""
        errors = self.eager_errors / self.scale(rms).clamp_min_(_TINY)
        errors = errors if self.usable is None else errors[self.usable]
        return float(errors.max()) if errors.numel() else 0.0


@dataclass
class _Totals:
    """Sums over all chunks."""

    count: int = 0
    usable: int = 0  # where eager is finite
    wrongly_infinite: int = 0
    squares: float = 0.0
    largest: float = 0.0
    magnitude: float = 0.0
    error: float = 0.0
    eager_error: float = 0.0
    eager_largest: float = 0.0

    def add(self, part: _Errors) -> None:
        eager_errors = part.eager_errors if part.usable is None else part.eager_errors[part.usable]
        self.count += part.true.numel()
        self.usable += eager_errors.numel()
        self.wrongly_infinite += part.wrongly_infinite
        self.squares += float(part.true.square().sum())
        self.magnitude += float(part.magnitude.sum())
        self.largest = max(self.largest, float(part.magnitude.max()) if part.true.numel() else 0.0)
        self.error += float(part.error.sum())
        self.eager_error += float(eager_errors.sum())
        self.eager_largest = max(self.eager_largest, float(eager_errors.max()) if eager_errors.numel() else 0.0)

    @property
    def rms(self) -> float:
        return float((self.squares / self.count) ** 0.5)


class _Parts:
    """The tensors piece by piece, as often as asked: float64 copies of whole activations would need more memory than
    the model. A single piece is kept."""

    def __init__(self, result: Tensor, eager: Tensor, oracle: Tensor) -> None:
        self._flat = [tensor.reshape(-1) for tensor in (result, eager, oracle)]
        self._dtype = result.dtype
        self._kept = [*self._made()] if result.numel() <= _CHUNK else None

    def __iter__(self) -> Iterator[_Errors]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[_Errors]:
        for new, old, true in zip(*(tensor.split(_CHUNK) for tensor in self._flat), strict=True):
            yield _Errors.of(new, old, true, self._dtype)
