"""`burnish explain`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import burnish
from burnish.hardware import Rates
from burnish.report import after, explain

from .running import fails, run, run_json


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measuring of the machine, and hardly any of models."""
    here = replace(burnish.device("cpu", measure=False), rates=Rates(10.0, {"float32": 100.0}, "2026-01-01T00:00:00"))
    for module in (explain, after):
        monkeypatch.setattr(module, "device", lambda where: here)
    monkeypatch.setattr(after, "_SECONDS", 0.01)
    monkeypatch.setitem(explain.explain.__kwdefaults__, "seconds", 0.01)


def test_shown() -> None:
    text = run("explain", "factory:block")
    assert text.startswith("factory:block: Block; x 2x5x16")
    for part in ("Where the time of a call goes", "unattributed", "What can be fused", "linear + activation"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_before_and_after(folder: Path) -> None:
    files = [folder / name for name in ("r.html", "r.md", "r.json")]
    options = zip(("--html", "--markdown", "--trace"), map(str, files), strict=True)
    text = run("explain", "factory:block", "--optimize", *(word for pair in options for word in pair))
    assert "What was fused" in text
    assert "Calls served" in text
    assert all(f"{path} is written." in text for path in files)
    assert json.loads(files[2].read_text())["traceEvents"]


def test_data() -> None:
    data = run_json("explain", "factory:block", "--batch", "3")
    assert (data["name"], data["schema"]) == ("factory:block", 4)
    assert data["explanation"]["inputs"] == ["x float32[3, 5, 16]"]


def test_a_target() -> None:
    data = run_json("explain", "factory:block", "--target", "a100")
    before = data["explanation"]["before"]
    assert (before["device"], before["predicted"]) == ("NVIDIA A100 80GB SXM (not here)", True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["factory:block", "--target", "h300"], "there is no target 'h300'; there are: a100"),
        (["factory:block", "--target", "h200", "--device", "cpu"], "leave out --device"),
        (["factory:block", "--target", "h200", "--optimize"], "leave out --optimize"),
        (["factory:block", "--html", "nowhere/r.html"], "--html nowhere/r.html: there is no folder"),
        (["factory:data_dependent"], "factory.py:"),
        (["factory:unfit"], "normalized_shape"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    assert message in fails("explain", *args)
