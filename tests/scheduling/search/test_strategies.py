"""The order of choices."""

from __future__ import annotations

import itertools
import math

from burnish.scheduling.search.space import Choice, Space, key_of
from burnish.scheduling.search.strategies import at_random, each, local

SPACE = Space.of({"a": [0, 1, 2], "b": [True, False], "c": ["x", "y"]}, ())


def test_all_go_from_few_changes_to_many() -> None:
    choices = list(each(SPACE))
    changes = [sum(choice[name] != SPACE.first[name] for name in choice) for choice in choices]
    assert changes == sorted(changes)
    assert choices[:3] == [SPACE.first, {**SPACE.first, "a": 1}, {**SPACE.first, "b": False}]
    assert len({key_of(choice) for choice in choices}) == SPACE.count == 12


def test_a_seed_decides_and_none_comes_twice() -> None:
    once, again, other = (list(at_random(SPACE, seed)) for seed in (3, 3, 4))
    assert once == again != other
    assert once[0] == SPACE.first
    assert len({key_of(choice) for choice in once}) == len(once) == 12


def test_a_space_too_large_to_list() -> None:
    vast = Space.of({f"n{i}": list(range(10)) for i in range(30)}, ())
    assert len(list(itertools.islice(at_random(vast, 0), 5))) == 5
    assert len(list(itertools.islice(each(vast), 5))) == 5


def test_local_goes_on_while_it_gets_better_and_ends() -> None:
    def rating(choice: Choice) -> float:
        return {"ax": 1, "by": 3, "ay": 2}.get(f"{choice['a']}{choice['b']}", -math.inf)

    space = Space.of({"a": ["a", "b"], "b": ["x", "y"]}, ())
    named = [f"{choice['a']}{choice['b']}" for choice in local(space, space.first, rating)]
    assert list(dict.fromkeys(named)) == ["ax", "bx", "ay", "by"]
    nothing = list(local(space, space.first, lambda choice: -math.inf))
    assert len(nothing) == 5


def test_true_is_not_one() -> None:
    space = Space.of({"n": [1, True, 1.0]}, ())
    assert [space.places({"n": value}) for value in (1, True, 1.0)] == [(0,), (1,), (2,)]
    assert space.has({"n": True})
    assert not space.has({"n": False})
    assert not space.has({"n": 1, "m": 2})
