"""A fake task; and a collector that does not walk through all that the tests have imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.scheduling.search.fakes import Clock, Fake


@pytest.fixture(autouse=True)
def only_new_objects() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A task, and a search whose clock only its steps move."""
    clock = Clock()
    monkeypatch.setattr("burnish.bench.time", clock)
    monkeypatch.setattr("burnish.scheduling.search.search.time", clock)
    return Fake(clock)
