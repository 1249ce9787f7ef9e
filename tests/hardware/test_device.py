"""`device()` on this machine: which device, measured how often, kept how."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import burnish.hardware
from burnish.hardware import Rates, device, fingerprint

RATES = Rates(
    copy_gbs=30.0,
    gflops={"float32": 200.0, "bfloat16": 400.0},
    date="2026-01-01T00:00:00+00:00",
    libraries={"float32": {"MKL": 150.0, "oneDNN": 200.0}, "bfloat16": {"oneDNN": 400.0}},
)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """An empty cache folder and a measurement that costs nothing; the devices measured are listed."""
    calls: list[torch.device] = []

    def measure(target: torch.device) -> Rates:
        calls.append(target)
        return RATES

    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(burnish.hardware.ceilings, "measure", measure)
    forget(monkeypatch)
    return calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: only what is on disk is known."""
    monkeypatch.setattr(burnish.hardware, "_remembered", {})


def saved_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


def test_every_way_to_say_cpu() -> None:
    assert device(torch.device("cpu"), measure=False) == device("cpu:0", measure=False) == device("cpu", measure=False)


def test_default_is_cuda_where_there_is_one() -> None:
    assert device(measure=False).kind == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("target", ["tpu9000", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(target: str) -> None:
    with pytest.raises(ValueError, match=rf"target='{target}' is not .*; these are here: 'cpu'"):
        device(target)


def test_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="target=7 is a int"):
        device(7)  # type: ignore[arg-type]


def test_measures_once_per_process_and_once_per_machine(
    measured: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device("cpu").rates == device("cpu").rates == RATES
    assert len(measured) == 1
    forget(monkeypatch)
    assert device("cpu").rates == RATES
    assert len(measured) == 1
    device("cpu", refresh=True)
    assert len(measured) == 2


def test_another_number_of_threads_is_another_device(measured: list[torch.device]) -> None:
    threads = torch.get_num_threads()
    first = fingerprint("cpu")
    device("cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert fingerprint("cpu") != first
        device("cpu")
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2
    assert fingerprint("cpu") == first


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda saved: "not json", id="not json"),
        pytest.param(lambda saved: "[1, 2]", id="a list"),
        pytest.param(lambda saved: json.dumps({**saved, "copy_gbs": -1}), id="negative"),
        pytest.param(lambda saved: json.dumps({**saved, "copy_gbs": math.nan}), id="NaN"),
        pytest.param(lambda saved: json.dumps({**saved, "gflops": {}}), id="no rates"),
        pytest.param(lambda saved: json.dumps({**saved, "gflops": [3]}), id="rates of another type"),
        pytest.param(lambda saved: json.dumps({**saved, "libraries": {"float32": {"MKL": 0}}}), id="zero by a library"),
        pytest.param(lambda saved: json.dumps({**saved, "libraries": {"float32": 3}}), id="libraries of another type"),
        pytest.param(lambda saved: json.dumps(without(saved, "libraries")), id="of an older version"),
        pytest.param(lambda saved: json.dumps({**saved, "date": "yesterday"}), id="no date"),
        pytest.param(lambda saved: json.dumps({**saved, "fingerprint": "another machine"}), id="another machine"),
    ],
)
def test_a_damaged_cache_is_measured_again(
    measured: list[torch.device],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[dict[str, Any]], str],
) -> None:
    device("cpu")
    path = saved_file(tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    forget(monkeypatch)
    assert device("cpu").rates == RATES
    assert len(measured) == 2
    assert json.loads(path.read_text())["copy_gbs"] == RATES.copy_gbs


def without(saved: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in saved.items() if name != key}


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    measured: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath("file", *parts))
    assert device("cpu").rates == RATES


def test_fingerprint_measures_nothing(measured: list[torch.device]) -> None:
    assert fingerprint("cpu") == device("cpu", measure=False).fingerprint
    assert torch.__version__ in fingerprint("cpu")
    assert not measured
