"""The file of trials: what is read back, and what of it is not believed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from burnish.scheduling.search.store import Store
from burnish.scheduling.search.trial import Trial

WORKED = Trial({"batch": 8, "fused": True}, 8.0, 0.5, 1000, is_baseline=True, device="a CPU")
FAILED = Trial({"batch": 16, "fused": None}, failure="out of memory: much", out_of_memory=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "trials.json"
    store = Store(path, "ours")
    store.add(WORKED)
    store.add(FAILED)
    return path


def test_what_was_added_is_there(path: Path) -> None:
    assert Store(path, "ours").trials() == [WORKED, FAILED]


def test_another_task_sees_none_and_loses_none(path: Path) -> None:
    other = Store(path, "theirs")
    assert other.trials() == []
    other.add(FAILED)
    assert Store(path, "ours").trials() == [WORKED, FAILED]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 7, "trials": []}', "\x00\xff"])
def test_another_file_is_put_aside(text: str, path: Path) -> None:
    path.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="trials.json cannot be read.*trials.json.unreadable now"):
        store = Store(path, "ours")
    assert store.trials() == []
    assert path.with_name("trials.json.unreadable").read_text(encoding="latin-1") == text
    store.add(WORKED)
    assert Store(path, "ours").trials() == [WORKED]


@pytest.mark.parametrize(
    "edit",
    [
        {"seconds": -1.0},
        {"seconds": "0.5"},
        {"seconds": float("inf")},
        {"seconds": None},
        {"memory": 10.5},
        {"work": 0},
        {"choice": {"batch": [8]}},
        {"choice": "batch"},
        {"failure": None},
        {"in_turn": 1},
        {"more": 1},
    ],
)
def test_a_damaged_trial_is_left_out(edit: dict[str, Any], path: Path) -> None:
    data = json.loads(path.read_text())
    data["trials"][0]["trial"].update(edit)
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="1 of 2 trials are damaged"):
        assert Store(path, "ours").trials() == [FAILED]


def test_no_file_is_no_trouble(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(tmp_path / "none.json", "ours").trials() == []
    store = Store(None, "ours")
    store.add(WORKED)
    assert store.trials() == []
