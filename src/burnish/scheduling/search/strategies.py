"""In which order choices are tried. Each strategy is a generator; it may name a choice again, which costs nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from burnish.scheduling.search.space import Choice, Space, key_of

NAMES = ("all", "random", "local")
Rating = Callable[[Choice], float]


def order_of(strategy: str, space: Space, *, seed: int, start: Choice, rating: Rating) -> Iterator[Choice]:
    """The choices of a strategy.

    Args:
        start: the best that is known when the search begins.
        rating: how good a choice is that was named before; higher is better, -inf where it did not work.
    """
    if strategy == "all":
        return each(space)
    if strategy == "random":
        return at_random(space, seed)
    return local(space, start, rating)


def each(space: Space) -> Iterator[Choice]:
    """All: first what differs from the first choice in one name, then in two, ...; so that a search that is cut short
    has seen each change by itself. Among these, earlier values come earlier."""
    names = list(space.values)
    for changes in range(len(names) + 1):
        group = [
            {**space.first, **dict(zip(changed, values, strict=True))}
            for changed in itertools.combinations(names, changes)
            for values in itertools.product(*(space.values[name][1:] for name in changed))
        ]
        yield from sorted(group, key=lambda choice: sum(space.places(choice)))


def at_random(space: Space, seed: int) -> Iterator[Choice]:
    """The first choice, then all others, in an order that the seed decides."""
    source, named = random.Random(seed), {0}
    yield space.first
    while len(named) < space.count:
        index = source.randrange(space.count)
        if index not in named:
            named.add(index)
            yield space.at(index)


def local(space: Space, start: Choice, rating: Rating) -> Iterator[Choice]:
    """Coordinate descent: all values of one name, the rest as in the best so far; then of the next name; until a round
    through all names brings nothing. What it ends with may be worse than what changing two names at once would find."""
    best = start
    yield best
    came_from = None
    while came_from != key_of(best):
        came_from = key_of(best)
        for name, values in space.values.items():
            line = [{**best, name: value} for value in values]
            yield from line
            best = max(line, key=rating)  # the earliest, of equal ones
