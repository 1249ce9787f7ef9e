"""Sets of names, written as text."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of `text`: a long list of names reads better as lines of text than as one line each."""
    return frozenset(text.split())
