"""The zoo: every model that Burnish must get right, small, seeded and offline, with what each of its layers holds.

    @pytest.mark.parametrize("case", zoo.params())                      # all of them
    @pytest.mark.parametrize("case", zoo.params("bert-*", "llama-*"))   # some

`CASES` are the tests' models, by name: real structures, two layers, width 64. `BIG` are those that benchmarks time.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from . import big, hugging_face, plain_cases
from .case import BATCH, SEQ, SHAPES, Case, Stack, seeded, without_dropout

__all__ = ["BATCH", "BIG", "CASES", "SEQ", "SHAPES", "Case", "Stack", "params", "seeded", "without_dropout"]

CASES: dict[str, Case] = {case.name: case for case in (*hugging_face.cases(), *plain_cases.cases())}
BIG: dict[str, Case] = {case.name: case for case in big.cases()}


def params(*patterns: str) -> list[object]:
    """`pytest.param`s, with id and marks, of the cases whose name matches one of the glob `patterns` (none: all).

    A pattern that matches no case is a ValueError, so that a renamed case cannot silently drop out of a test.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            raise ValueError(f"no case of the zoo matches {pattern!r}; there are {', '.join(CASES)}")
    chosen = [case for case in CASES.values() if not patterns or any(fnmatchcase(case.name, p) for p in patterns)]
    return [pytest.param(case, id=case.name, marks=case.marks) for case in chosen]
