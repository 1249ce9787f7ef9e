"""What a mask says that a model computes from positions: `keys <= queries`, and whatever is true of all of them.

Hugging Face's models compute their masks so under `torch.compile`, where none can be left out for its values: positions
from arange, compared, and those of packed sequences, which begin wherever positions do not go up by one. The values of
such a graph are known without running it: each entry is an affine function of where it stands, or the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from burnish.rewrites.rewrite import arguments, same, value

aten = torch.ops.aten


@dataclass(frozen=True)
class _Affine:
    """Entries that are `start` and, for each step along dimension d, `steps[d]` more."""

    steps: tuple[int, ...]
    start: Any

    @property
    def is_constant(self) -> bool:
        return not any(self.steps)

    def aligned(self, rank: int) -> _Affine:
        return _Affine((0,) * (rank - len(self.steps)) + self.steps, self.start)

    def minus(self, other: _Affine) -> _Affine:
        rank = max(len(self.steps), len(other.steps))
        one, two = self.aligned(rank), other.aligned(rank)
        return _Affine(tuple(a - b for a, b in zip(one.steps, two.steps, strict=True)), self.start - other.start)


@dataclass(frozen=True)
class _UpTo:
    """True where the last index is at most the one before it and `shift` more."""

    shift: Any


_Known = _Affine | _UpTo | bool | None
"""Entries that are numbers, or true up to the diagonal, or the same truth everywhere; None where nothing is known."""


def causal_shift(mask: Any) -> Any:
    """How many keys beyond its own number each query sees, where that is all that a boolean mask says; else None."""
    found = _known(mask, {}) if isinstance(mask, fx.Node) else None
    return found.shift if isinstance(found, _UpTo) else None


def _known(node: fx.Node, seen: dict[fx.Node, _Known]) -> _Known:
    if node not in seen:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        given = arguments(node) if rule is not None else {}
        found = None if rule is None else rule(node, given, lambda arg: _known(arg, seen))
        if isinstance(found, _Affine):  # along a dimension of one entry there are no steps, and it broadcasts
            sizes = value(node).shape
            steps = tuple(0 if same(size, 1) else step for size, step in zip(sizes, found.steps, strict=True))
            found = _Affine(steps, found.start)
        seen[node] = found
    return seen[node]


_Ask = Callable[[fx.Node], _Known]
_Given = dict[str, Any]


def _arange(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    if given.get("step", 1) != 1 or value(node).dtype != torch.int64:
        return None
    return _Affine((1,), value(given.get("start", 0)))


def _true(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    return True if value(node).dtype == torch.bool and given.get("fill_value", True) is True else None


def _unsqueeze(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    found = ask(given["self"])
    if not isinstance(found, _Affine):
        return found if isinstance(found, bool) else None
    at = given["dim"] % (len(found.steps) + 1)
    return _Affine((*found.steps[:at], 0, *found.steps[at:]), found.start)


def _slice(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    found = ask(given["self"])
    if not isinstance(found, _Affine) or given["step"] != 1:
        return None
    start = value(given["start"]) or 0
    if not isinstance(start, int) or start < 0:
        return None
    return _Affine(found.steps, found.start + found.steps[given["dim"]] * start)


def _expand(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    found = ask(given["self"])
    return found.aligned(value(node).dim()) if isinstance(found, _Affine) else found


def _moved(sign: int) -> Callable[[fx.Node, _Given, _Ask], _Known]:
    def rule(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
        found, by = ask(given["self"]), value(given["other"])
        whole = isinstance(by, int | torch.SymInt) and given["alpha"] == 1
        return _Affine(found.steps, found.start + sign * by) if isinstance(found, _Affine) and whole else None

    return rule


def _diff(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    """The step, everywhere, if what stands before the first entry is where that came from."""
    found, before = (ask(given[name]) if given[name] is not None else None for name in ("self", "prepend"))
    if not isinstance(found, _Affine) or not isinstance(before, _Affine) or given["n"] != 1 or given["append"]:
        return None
    step = found.steps[given["dim"]]
    first = _Affine(found.steps, found.start - step).minus(before)
    along = given["dim"] % len(first.steps)
    others = [s for d, s in enumerate(first.steps) if d != along]
    one = same(value(given["prepend"]).shape[along], 1)
    return _Affine((0,) * len(found.steps), step) if one and same(first.start, 0) and not any(others) else None


def _not_equal(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    found = ask(given["self"])
    if not isinstance(found, _Affine) or not found.is_constant or not isinstance(found.start, int):
        return None
    return bool(found.start != given["other"])


def _cumsum(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    return _Affine((0,) * value(node).dim(), 0) if ask(given["self"]) is False else None


def _index(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    found, places = ask(given["self"]), given["indices"]
    if not isinstance(found, _Affine) or len(places) != len(found.steps) or None in places:
        return None
    result = _Affine((0,) * value(node).dim(), found.start)
    for step, place in zip(found.steps, map(ask, places), strict=True):
        if step == 0:
            continue
        if not isinstance(place, _Affine) or not isinstance(place.start, int) or min(place.start, *place.steps) < 0:
            return None  # a place below 0 counts from the end
        far = place.aligned(len(result.steps))
        steps = tuple(a + step * b for a, b in zip(result.steps, far.steps, strict=True))
        result = _Affine(steps, result.start + step * far.start)
    return result


def _equal(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    one, two = ask(given["self"]), ask(given["other"])
    if not isinstance(one, _Affine) or not isinstance(two, _Affine):
        return None
    apart = one.minus(two)
    return True if apart.is_constant and same(apart.start, 0) else None


def _compared(lower: str, upper: str) -> Callable[[fx.Node, _Given, _Ask], _Known]:
    def rule(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
        below, above = ask(given[lower]), ask(given[upper])
        if not isinstance(below, _Affine) or not isinstance(above, _Affine):
            return None
        apart = above.minus(below)
        diagonal = len(apart.steps) >= 2 and apart.steps[-2:] == (1, -1) and not any(apart.steps[:-2])
        return _UpTo(apart.start) if diagonal else None

    return rule


def _and(node: fx.Node, given: _Given, ask: _Ask) -> _Known:
    one, two = ask(given["self"]), ask(given["other"])
    if one is True:
        return two
    return one if two is True else None


_RULES: dict[Any, Callable[[fx.Node, _Given, _Ask], _Known]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.new_ones.default: _true,
    aten.ones.default: _true,
    aten.full.default: _true,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.expand.default: _expand,
    aten.add.Tensor: _moved(1),
    aten.sub.Tensor: _moved(-1),
    aten.diff.default: _diff,
    aten.ne.Scalar: _not_equal,
    aten.cumsum.default: _cumsum,
    aten.index.Tensor: _index,
    aten.eq.Tensor: _equal,
    aten.le.Tensor: _compared("self", "other"),
    aten.ge.Tensor: _compared("other", "self"),
    aten.bitwise_and.Tensor: _and,
    aten.logical_and.default: _and,
    aten.__and__.Tensor: _and,
}
