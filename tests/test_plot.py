"""The plot of a sweep: every line with its label, labels apart, and one clear line where it cannot be drawn."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.bench import Benchmark, Timing
from burnish.hardware import device
from burnish.plot import _LABEL_GAP, _apart, _colours, check_plot, plot_sweep
from burnish.sweep import Sweep


@pytest.fixture
def sweep() -> Sweep:
    def measured(us: float) -> Benchmark:
        timings = {
            name: Timing(((us * factor,),)) for name, factor in (("eager", 1), ("burnish", 0.9), ("liger", 0.95))
        }
        return Benchmark(timings, device("cpu", measure=False), "2026-01-02T03:04:05+00:00")

    return Sweep("gated_mlp", "x 1xnx1024", "tokens", {n: measured(50 + n) for n in (1, 16, 256)}, {1: 5, 256: 90})


def test_what_is_written_in_it(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    drawn = plot_sweep(sweep, tmp_path / "mlp.svg").read_text()
    for text in (
        "gated_mlp: time of a call",
        "x 1xnx1024",
        "tokens",
        "eager  306 us",
        "burnish  275 us",
        "floor  90 us",
    ):
        assert f">{text}<" in drawn
    assert device("cpu", measure=False).label in drawn
    assert "<image" not in drawn


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_other_files(suffix: str, sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    path = plot_sweep(sweep, tmp_path / f"mlp.{suffix}")
    assert path.read_bytes().startswith({"png": b"\x89PNG", "pdf": b"%PDF"}[suffix])


def test_ours_stands_out_and_no_two_are_alike() -> None:
    colours: dict[str, Any] = _colours(["eager", "burnish", *"abcdefg"])
    assert len(set(colours.values())) == len(colours)
    assert _colours(["burnish", "eager"])["burnish"] == colours["burnish"]


def test_labels_that_would_touch_are_moved_apart() -> None:
    heights = {"a": 0.5, "b": 0.51, "c": 0.52, "d": 0.9}
    placed = _apart(heights)
    assert placed["d"] == 0.9
    assert placed["b"] == pytest.approx(0.51)
    ordered = sorted(placed.values())
    assert all(above - below >= _LABEL_GAP - 1e-9 for below, above in itertools.pairwise(ordered))
    assert sorted(placed, key=placed.__getitem__) == ["a", "b", "c", "d"]


def test_what_cannot_be_drawn(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a plot ends in \.svg, \.png or \.pdf"):
        check_plot(Path("mlp.jpg"))
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    alone = Sweep("gated_mlp", "", "tokens", {1: sweep.results[1]})
    with pytest.raises(ValueError, match="wants two sizes at least"):
        plot_sweep(alone, tmp_path / "mlp.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib is missing: pip install 'burnish\[plot\]'"):
        plot_sweep(sweep, tmp_path / "mlp.svg")
    assert not [*tmp_path.glob("*.svg")]
