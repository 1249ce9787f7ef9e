"""Which Impl is fastest here: measured, remembered on disk, looked up for sizes nearby.

A *family* is everything about a call except its sizes (op, dtypes, layouts, constants); a *choice* is what was measured
for one list of sizes in a family. A size that was never measured takes the choice of its nearest neighbour within a
factor of two; only where there is none is it measured, within the caller's time budget.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from burnish import tuning_store
from burnish.candidates import callable_of, candidates_of, rounded
from burnish.impl import Impl
from burnish.measure import FEWEST_SAMPLES, measure, measure_captured, measure_captured_in_step, measure_in_step
from burnish.op import OPS, ImplUnavailable, Op, find_impl
from burnish.parallel.agreement import Agreement
from burnish.parallel.graphs import group_of_call
from burnish.sources import kernels_hash
from burnish.tuning_store import Families

CacheMode = Literal["readwrite", "readonly", "off"]
_MEASURED_ROWS = 4096  # of a larger weight, as many rows tell which storage is faster
_COLD_BYTES = 4 << 20  # more than the caches of one core hold
# One that stands earlier in its Op's order is passed over only for one that is faster than noise: 3% on a shared CPU,
# 1% for a chain of calls in a CUDA graph.
_PREFERENCE = {"cpu": 1.03, "cuda": 1.01}
_IN_MODEL = "in model|"  # before a family: times of whole models
_RIVAL = 1.4  # H200: in BERT-base a product 1.3 times as slow by itself was the faster one
_RIVALS = 8  # so many are tried for a signature,
_OF_ONE_IMPL = 3  # and of each Impl so many: a config of attention took 9.9 us in one process and 18.1 in another
_NEIGHBOURS_BEST = 4  # of a nearby size's candidates, so many are measured for a new size


@dataclass(frozen=True)
class Choice:
    """The Impl chosen for one call signature.

    Attributes:
        impl: its name.
        config: how its kernel is to be run, for an Impl that can be run in several ways.
        times_us: microseconds of every candidate that was measured, an Impl or "impl config" (empty: none was).
        rejected: why each other Impl could not take the call, by name.
        in_model_us: microseconds of the whole model with each candidate that was tried in it, the winner first.
        source: "measured", "cached", "nearby" (a neighbour's choice), "explicit" (asked for by the user), "only" or
            "default".
    """

    impl: str
    times_us: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    source: str = "measured"
    config: str | None = None
    in_model_us: dict[str, float] = field(default_factory=dict)

    @property
    def candidate(self) -> str:
        """Its name in `times_us`."""
        return self.impl if self.config is None else f"{self.impl} {self.config}"


@dataclass(frozen=True)
class Key:
    """The signature of a call as tuning sees it."""

    family: str
    sizes: tuple[int, ...]


def key_of(op: Op, args: Sequence[Any], differentiable: bool = False, live_rows: Tensor | None = None) -> Key:
    """The family and sizes of a call `op(*args)`; where it is told how many rows are wanted, these are a size, too."""
    family = [op.name, "grad" if differentiable else ""]
    sizes: list[int] = []
    for arg in args:
        if isinstance(arg, Tensor):
            family.append(f"{str(arg.dtype).removeprefix('torch.')}{arg.dim()}{_layout(arg)}@{arg.device.type}")
            sizes.extend(arg.shape)
        else:
            family.append(repr(arg))
    if group := group_of_call(op, args):  # one group's name says nothing of the next process's
        from burnish.parallel.group import rank_and_size

        family[2 + list(op.signature.parameters).index("group_name")] = f"{rank_and_size(group)[1]} ranks"
    if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
        family.append(kernels_hash(op))
    if live_rows is not None:
        family.append("live rows")
        sizes.append(rounded(live_rows))
    return Key("|".join(family), tuple(sizes))


def is_current(family: str) -> bool:
    """Whether a family was measured with its Op's kernels as they are now. False for what no GPU was asked."""
    name, *rest = family.removeprefix(_IN_MODEL).split("|")
    return name in OPS and kernels_hash(OPS[name]) in rest


def _layout(tensor: Tensor) -> str:
    if tensor.is_contiguous():
        return "c"
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        return "t"
    if 0 in tensor.stride():
        return "e"
    return "s" if tensor.stride(-1) == 1 else "g"


class Tuner:
    """Chooses Impls. One per `optimize` call; its memory on disk is shared by all of them.

    Args:
        cache: "readwrite", "readonly" (never writes) or "off" (neither reads nor writes).
        explicit: Impl names by Op name that the user demands; they are never measured against others.
        agreement: between the ranks of a divided model, all of whom go by what the first of them measures.
    """

    FIRST_BUDGET_US = 120_000.0  # for each distinct product, norm, ... of the first call
    NEW_SIZE_BUDGET_US = 15_000.0  # for all of a new size together

    def __init__(
        self,
        cache: CacheMode = "readwrite",
        explicit: dict[str, str] | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        if cache not in ("readwrite", "readonly", "off"):
            raise ValueError(f"cache={cache!r}: use 'readwrite', 'readonly' or 'off'")
        self.cache = cache
        self.explicit = dict(explicit or {})
        self.agreement = agreement or Agreement()
        self.choices: dict[Key, Choice] = {}
        self._disk = tuning_store.read_all() if cache != "off" else {}
        self._measured: Families = {}
        self._dirty = False

    def choose(
        self,
        op: Op,
        args: Sequence[Any],
        *,
        budget_us: float,
        thorough: bool = False,
        variants: Sequence[Sequence[Any]] = (),
        in_place: bool = False,
        live_rows: Tensor | None = None,
    ) -> tuple[Callable[..., Any], Choice]:
        """The callable for `op(*args)`, and the choice that it stands for.

        Args:
            in_place: the callable may write into what the Op donates.
            live_rows: how many rows are wanted; the callable then takes that keyword, whether the Impl does or not, and
                is measured with what it holds now.
            budget_us: how many microseconds may be spent on measuring; 0 means look up only.
            thorough: measure these very sizes unless they are remembered; a neighbour's choice will not do.
            variants: further argument lists of the same signature (other layers' weights), measured in turn, so that
                weights come from where they come from in the model rather than from the nearest cache.
        """
        key = key_of(op, args, live_rows=live_rows)
        known = self.choices.get(key)
        if known is None:
            if group := group_of_call(op, args):
                _set_up_exchange(group, args)
            known = self._explicit(op, args) or self._choose(op, key, args, budget_us, thorough, variants, live_rows)
            if self.agreement.is_shared:
                known = Choice(**self.agreement.first(asdict(known)))
            self.choices[key] = known
        return callable_of(op, args, known.impl, known.config, in_place, live_rows), known

    def _explicit(self, op: Op, args: Sequence[Any]) -> Choice | None:
        name = op.asked_for(self.explicit)
        if name is None:
            return None
        if reasons := find_impl(op, name).why_not(*args):
            raise ImplUnavailable(op.name, name, reasons)
        return Choice(name, source="explicit")

    def _choose(
        self,
        op: Op,
        key: Key,
        args: Sequence[Any],
        budget_us: float,
        thorough: bool,
        variants: Sequence[Sequence[Any]],
        live_rows: Tensor | None,
    ) -> Choice:
        rejected = {name: reasons for name, impl in op.impls.items() if (reasons := _reasons_against(impl, args))}
        remembered, in_model = (self._disk.get(prefix + key.family, {}) for prefix in ("", _IN_MODEL))
        group = group_of_call(op, args)
        if group:  # all ranks measure it, or none does; so whatever decides that is the same on all of them
            oks = self.agreement.all_of([name not in rejected for name in op.impls])
            for name, ok in zip(op.impls, oks, strict=True):
                if not ok:
                    rejected.setdefault(name, ["it cannot take them on another rank"])
            remembered, in_model = self.agreement.first((remembered, in_model))
            budget_us = self.agreement.first(budget_us)
        able = [name for name in op.impls if name not in rejected]
        device = "cuda" if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args) else "cpu"
        if device == "cuda" and len(able) > 1:  # many passes over memory: not worth the time to measure it
            able.remove("reference")
        candidates = candidates_of(op, args, able, live_rows)

        def chosen(times: Mapping[str, float], source: str, sizes: str) -> Choice:
            found = in_model.get(sizes, {})
            winner = next(iter(found), None)
            if winner not in candidates:
                winner = _fastest(times, [name for name in candidates if name in times], device)
            impl, config = candidates[winner]
            return Choice(impl, dict(times), rejected, source, config, dict(found))

        if len(candidates) == 1:
            return Choice(able[0], rejected=rejected, source="only")
        sizes = _sizes_text(key.sizes)
        times = remembered.get(sizes)
        if times is not None and _covers(times, candidates):
            return chosen(times, "cached", sizes)
        near = None if thorough else _nearest(remembered, key.sizes)
        if near is not None and near.times.keys() & candidates.keys():
            # One call to warm up and as many as it takes not to mistake the machine's noise for a difference.
            costs_us = (1 + FEWEST_SAMPLES) * sum(filter(math.isfinite, near.times.values())) * near.ratio
            # An Impl that only these sizes have is no reason not to take what is best there.
            if near.distance <= 1 or costs_us > budget_us or not _covers(near.times, candidates):
                return chosen(near.times, "nearby", near.sizes)
            if device == "cuda":  # what is compiled already, and was among the best
                best = sorted(near.times, key=near.times.__getitem__)[:_NEIGHBOURS_BEST]
                candidates = {name: candidates[name] for name in candidates if name in best} or candidates
        elif not thorough:
            return Choice(able[0], rejected=rejected, source="default")
        if budget_us <= 0:
            return Choice(able[0], rejected=rejected, source="default")
        if group:
            times = self.agreement.first(self._measure_in_step(op, candidates, args, device))
        else:
            times = self._measure(op, candidates, [args, *variants], device, budget_us, live_rows)
        self._remember(key.family, sizes, times)
        return chosen(times, "measured", sizes)

    def known_sizes(self, key: Key) -> list[tuple[int, ...]]:
        """The other sizes of the family that were measured, the nearest first."""
        near = [near.numbers for near in _neighbours(self._disk.get(key.family, {}), key.sizes) if near.distance > 0]
        return [tuple(sizes) for sizes in self.agreement.first(near)]

    def rivals(
        self, op: Op, args: Sequence[Any], choice: Choice, in_place: bool, live_rows: Tensor | None = None
    ) -> list[tuple[Callable[..., Any], Choice]]:
        """What else might be fastest in a model: the best few of each Impl that were measured and are not far behind
        the chosen one, the nearest first."""
        most = _RIVAL * choice.times_us.get(choice.candidate, 0.0)
        candidates = candidates_of(op, args, [name for name in op.impls if name not in choice.rejected], live_rows)
        found: list[Choice] = []
        for name in sorted(candidates.keys() & choice.times_us.keys(), key=choice.times_us.__getitem__):
            impl, config = candidates[name]
            known = sum(rival.impl == impl for rival in found)
            if name != choice.candidate and choice.times_us[name] <= most and known < _OF_ONE_IMPL:
                found.append(replace(choice, impl=impl, config=config))
        return [
            (callable_of(op, args, rival.impl, rival.config, in_place, live_rows), rival) for rival in found[:_RIVALS]
        ]

    def settle(self, key: Key, choice: Choice) -> None:
        """Remembers what was fastest in a model, for this signature."""
        self.choices[key] = choice
        self._remember(_IN_MODEL + key.family, _sizes_text(key.sizes), choice.in_model_us)

    def _measure(
        self,
        op: Op,
        candidates: Mapping[str, tuple[str, str | None]],
        arguments: Sequence[Sequence[Any]],
        device: str,
        budget_us: float,
        live_rows: Tensor | None,
    ) -> dict[str, float]:
        functions = {
            # In place, where that is possible: to write the same again changes nothing.
            name: callable_of(op, arguments[0], impl, config, True, live_rows)
            for name, (impl, config) in candidates.items()
        }
        if live_rows is not None:  # with what it holds: of fewer rows another kernel is the fastest
            functions = {name: functools.partial(run, live_rows=live_rows) for name, run in functions.items()}
        if device == "cpu":
            return measure(functions, arguments, budget_us=budget_us)
        if any(config is not None for _, config in candidates.values()):
            from burnish.kernels.warm_up import warm_up

            warm_up(functools.partial(function, *arguments[0]) for function in functions.values())
        return measure_captured(functions, arguments, op.weights)

    def _measure_in_step(
        self, op: Op, candidates: Mapping[str, tuple[str, str | None]], args: Sequence[Any], device: str
    ) -> dict[str, float]:
        """Of an Op that exchanges something with other ranks. Sums of zeros stay what they are, however often."""
        args = [torch.zeros_like(arg) if i in op.donates else arg for i, arg in enumerate(args)]
        functions = {
            name: callable_of(op, args, impl, config, in_place=True) for name, (impl, config) in candidates.items()
        }
        if device == "cpu":
            return measure_in_step({name: functools.partial(function, *args) for name, function in functions.items()})
        return measure_captured_in_step(functions, args, self.agreement.all)

    def prefers_transposed(self, linear: Op, rows: int, weight: Tensor, *, budget_us: float) -> bool:
        """Whether `linear` on `rows` rows is faster with such a weight stored (K, N): by its best Impl for either
        storage.

        Measured on random weights, several in turn where they are small: in a model a weight comes from memory, and
        that is where (K, N) wins most (Zen 4, 16 rows, 1536x384: 405 us against 579; from the cache 1.03x).
        """
        n, k = min(weight.shape[0], _MEASURED_ROWS), weight.shape[1]
        family, sizes = f"storage|{weight.dtype}", _sizes_text((rows, n, k))
        times = self._disk.get(family, {}).get(sizes)
        if times is None or set(times) != {"transposed", "plain"}:
            copies = max(1, min(4, _COLD_BYTES // max(1, n * k * weight.element_size())))
            x = torch.randn(rows, k).to(weight.dtype)
            plain = [torch.randn(n, k).to(weight.dtype) for _ in range(copies)]
            storages = {"transposed": [w.t().contiguous().t() for w in plain], "plain": plain}
            able = {
                f"{name} {storage}": _with_weights(impl.fn, storages[storage], x)
                for storage in storages
                for name, impl in linear.impls.items()
                if name != "reference" and not impl.why_not(x, storages[storage][0])
            }
            each = measure(able, [(i,) for i in range(copies)], budget_us=2 * budget_us)
            times = {s: min(us for name, us in each.items() if name.endswith(s)) for s in storages}
            self._remember(family, sizes, times)
        return self.agreement.first(_fastest(times, ("transposed", "plain"), "cpu") == "transposed")

    def _remember(self, family: str, sizes: str, times: dict[str, float]) -> None:
        for families in (self._disk, self._measured):
            families.setdefault(family, {})[sizes] = times
        self._dirty = True

    def save(self) -> None:
        """Writes what was measured since the last save, merged with what others wrote meanwhile. A folder that cannot
        be written is no error: the next process measures again."""
        if self._dirty and self.cache == "readwrite" and tuning_store.write(self._measured):
            self._dirty = False


def _reasons_against(impl: Impl, args: Sequence[Any]) -> list[str]:
    return impl.why_not(*args) or ([impl.named_only] if impl.named_only else [])


def _set_up_exchange(group_name: str, args: Sequence[Any]) -> None:
    """What Impls exchange rows by that need more than the group; where it cannot be had they say so themselves."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        from burnish.parallel import symmetric

        symmetric.set_up(group_name, device)


def _with_weights(fn: Callable[..., Any], weights: Sequence[Tensor], x: Tensor) -> Callable[[int], Any]:
    return lambda i: fn(x, weights[i])


def _covers(times: Mapping[str, float], candidates: Mapping[str, tuple[str, str | None]]) -> bool:
    """Whether every Impl among the candidates was measured, in some config at least."""
    measured = {candidates[name][0] for name in times if name in candidates}
    return measured >= {impl for impl, _ in candidates.values()}


def _fastest(times: Mapping[str, float], able: Sequence[str], device: str) -> str:
    """The first in the order of preference that is within noise of the fastest."""
    best = min(times[name] for name in able)
    return next(name for name in able if times[name] <= _PREFERENCE[device] * best)


@dataclass(frozen=True)
class _Neighbour:
    """Sizes that were measured: how far they are (the largest factor, as a power of two), and how much larger the asked
    ones are as a whole."""

    sizes: str
    numbers: tuple[int, ...]
    distance: float
    ratio: float
    times: dict[str, float]


def _nearest(entries: dict[str, dict[str, float]], sizes: Sequence[int]) -> _Neighbour | None:
    return next(iter(_neighbours(entries, sizes)), None)


def _neighbours(entries: dict[str, dict[str, float]], sizes: Sequence[int]) -> list[_Neighbour]:
    """All that were measured, the nearest first."""
    neighbours = []
    for text, times in entries.items():
        other = tuple(int(size) for size in text.split(",") if size)
        if len(other) == len(sizes):
            steps = [math.log2(max(a, 1) / max(b, 1)) for a, b in zip(sizes, other, strict=True)]
            distance = max(map(abs, steps), default=0.0)
            neighbours.append(_Neighbour(text, other, distance, 2 ** sum(steps), times))
    return sorted(neighbours, key=lambda neighbour: neighbour.distance)


def _sizes_text(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
