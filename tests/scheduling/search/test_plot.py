"""The plot of a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.scheduling.search.result import SearchResult
from burnish.scheduling.search.trial import Trial, rate
from tests.scheduling.search.fakes import Fake


def result_of(*rows: tuple[int, float, int], limit: float | None = None) -> SearchResult:
    """Of (batch, seconds, MiB)."""
    trials = [
        Trial({"batch": batch, "kind": "same"}, batch, seconds, mib * 2**20, is_baseline=not place, device="a device")
        for place, (batch, seconds, mib) in enumerate(rows)
    ]
    return SearchResult(trials, len(rows), limit, trials[0], task=None)  # type: ignore[arg-type]


ROWS = ((8, 1.0, 100), (16, 1.5, 180), (32, 2.5, 330), (24, 3.0, 340))


def test_what_is_written_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    drawn = result_of(*ROWS, limit=256 * 2**20).plot(tmp_path / "search.svg").read_text()
    for text in ("8", "16", "32", "24", "limit 256 MiB", "peak memory, MiB", "a device"):
        assert f">{text}<" in drawn
    assert "each point is a choice of batch<" in drawn  # the kind is the same for all
    assert "<image" not in drawn


def test_one_point_without_a_limit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    assert result_of(ROWS[0]).plot(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_front() -> None:
    assert [trial.choice["batch"] for trial in result_of(*ROWS).front] == [8, 16, 32]


def test_nothing_to_plot(fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    with pytest.raises(ValueError, match="no trial worked"):
        fake.search({"match": ["nothing"]}).plot(tmp_path / "none.svg")
    with pytest.raises(ValueError, match="a plot ends in"):
        result_of(*ROWS).plot(tmp_path / "none.jpg")


def test_rates_have_three_digits() -> None:
    assert [rate(value) for value in (0.03123, 9.876, 99.97, 123.4, 31234.0)] == [
        "0.0312",
        "9.88",
        "100",
        "123",
        "31,200",
    ]
