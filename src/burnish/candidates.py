"""The ways in which a call of an Op can run: its Impls, and each of their configs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from burnish.impl import Impl
from burnish.op import Op

_LIVE_STEP = 128


def candidates_of(
    op: Op, args: Sequence[Any], able: Sequence[str], live_rows: Tensor | None = None
) -> dict[str, tuple[str, str | None]]:
    """Each way to run the Op, by name: an Impl, or an Impl and one of its configs."""
    found: dict[str, tuple[str, str | None]] = {}
    for name in able:
        if op.impls[name].configs is None:
            found[name] = (name, None)
        else:
            configs = _configs(op.impls[name], args, live_rows)
            found |= {f"{name} {config}": (name, str(config)) for config in configs}
    return found


def _configs(impl: Impl, args: Sequence[Any], live_rows: Tensor | None) -> list[Any]:
    """The Impl's configs; where it is told how many rows are wanted also those for as many."""
    assert impl.configs is not None
    found = list(impl.configs(*args))
    if live_rows is not None and impl.live_rows:
        found += impl.configs(*_of_live_rows(args, rounded(live_rows)))
    return list({str(config): config for config in found}.values())


def _of_live_rows(args: Sequence[Any], live: int) -> list[Any]:
    """The arguments, those that have a line for each row of the first, a batch of one, cut to so many."""
    rows = args[0].shape[:2]

    def cut(arg: Any) -> Any:
        has_rows = isinstance(arg, Tensor) and arg.dim() > 1 and arg.shape[:2] == rows and rows[0] == 1
        return arg[:, :live] if has_rows else arg

    return list(map(cut, args))


def callable_of(
    op: Op, args: Sequence[Any], name: str, config: str | None, in_place: bool, live_rows: Tensor | None = None
) -> Callable[..., Any]:
    """The Impl of this name, with the config of this text where it has one, as calls like `op(*args)` want it."""
    impl = op.impls[name]
    function = (impl.in_place if in_place else None) or impl.fn
    if config is not None and impl.configs is not None:
        found = next((each for each in _configs(impl, args, live_rows) if str(each) == config), None)
        function = function if found is None else functools.partial(function, config=found)
    if live_rows is not None and not impl.live_rows:
        return functools.partial(_all_rows, function)
    return function


def _all_rows(function: Callable[..., Any], *args: Any, live_rows: Tensor) -> Any:
    """By an Impl that does not take how many rows are wanted."""
    return function(*args)


def rounded(live_rows: Tensor) -> int:
    """How many rows are wanted now, up to a multiple, by which batches of about as many share a choice. Waits for the
    device."""
    return max(1, -(-int(live_rows) // _LIVE_STEP)) * _LIVE_STEP
