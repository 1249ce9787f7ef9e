"""What can be chosen: names, each with its values."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "bool | int | float | str | None"
Choice: TypeAlias = "dict[str, Value]"
"""One value for each name."""

_KINDS = (bool, int, float, str, type(None))


def key_of(choice: Mapping[str, Value]) -> str:
    """Equal for equal choices only: `True` and `1` are two."""
    return json.dumps(choice, sort_keys=True)


def is_value(value: object) -> bool:
    return isinstance(value, _KINDS) and not (isinstance(value, float) and not math.isfinite(value))


@dataclass(frozen=True)
class Space:
    """Attributes:
    values: by name, in the user's order; the first of each are where the search begins.
    ordered: names whose later values need at least as much memory as those before.
    """

    values: Mapping[str, tuple[Value, ...]]
    ordered: frozenset[str]

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Value]], ordered: Collection[str]) -> Space:
        """ValueError or TypeError, in one line, for what is no space."""
        if not isinstance(values, Mapping) or not values:
            raise ValueError(
                f"space must be a dict of names and their values, such as {{'batch': [8, 16]}}: {values!r}"
            )
        for name, each in values.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"space: a name must be a string that is not empty, got {name!r}")
            if isinstance(each, str) or not isinstance(each, Sequence) or not each:
                raise ValueError(f"space[{name!r}] must be a list of values, got {each!r}")
            for value in each:
                if not is_value(value):
                    raise TypeError(f"space[{name!r}]: a value is a finite number, a string, a bool or None: {value!r}")
            if len({json.dumps(value) for value in each}) < len(each):
                raise ValueError(f"space[{name!r}] has a value twice: {list(each)}")
        if isinstance(ordered, str) or not set(ordered) <= set(values):
            raise ValueError(f"ordered must be a list of names in space ({', '.join(values)}), got {ordered!r}")
        return cls({name: tuple(each) for name, each in values.items()}, frozenset(ordered))

    @property
    def first(self) -> Choice:
        return {name: values[0] for name, values in self.values.items()}

    @property
    def count(self) -> int:
        """How many choices there are."""
        return math.prod(map(len, self.values.values()))

    def at(self, index: int) -> Choice:
        """The choices by number, the last name's values next to each other."""
        choice: Choice = {}
        for name, values in reversed(list(self.values.items())):
            index, place = divmod(index, len(values))
            choice[name] = values[place]
        return {name: choice[name] for name in self.values}

    def places(self, choice: Choice) -> tuple[int, ...]:
        """Where each value stands in its list."""
        return tuple(_place(values, choice[name]) for name, values in self.values.items())

    def has(self, choice: Mapping[str, Value]) -> bool:
        return choice.keys() == self.values.keys() and all(
            any(_same(value, each) for each in self.values[name]) for name, value in choice.items()
        )

    def needs_as_much(self, choice: Choice, as_choice: Choice) -> bool:
        """Whether `choice` surely needs as much memory as `as_choice`: it stands at or behind it in what is ordered,
        and is equal in all else."""
        pairs = zip(self.values, self.places(choice), self.places(as_choice), strict=True)
        return all(here >= there if name in self.ordered else here == there for name, here, there in pairs)


def _same(value: Value, other: Value) -> bool:
    return type(value) is type(other) and value == other


def _place(values: tuple[Value, ...], wanted: Value) -> int:
    return next(place for place, value in enumerate(values) if _same(value, wanted))
