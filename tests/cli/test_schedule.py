"""`burnish schedule`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from burnish.models import load
from burnish.scheduling import PRIMITIVES, create_schedule
from tests.cli.running import fails, run, run_json

STEPS = """
import torch


def wider(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def exact(x):
    return torch.nn.functional.gelu(x)
"""


@pytest.fixture(autouse=True)
def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`right.json` splits both Linears off their bias; `wrong.json` then takes another GELU."""
    (folder / "own_steps.py").write_text(STEPS)
    monkeypatch.delitem(sys.modules, "own_steps", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    import own_steps  # type: ignore[import-not-found]

    sch = create_schedule(load("factory:block").model)
    sch.find_all("*n").decompose()
    sch["up"].decompose()
    sch.save("right.json")
    sch.replace(own_steps.wider, sch.find(own_steps.exact))
    sch.save("wrong.json")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "own_steps")


def test_primitives_are_listed_with_what_they_do() -> None:
    text, data = run("schedule", "--primitives"), run_json("schedule", "--primitives")
    assert list(data) == sorted(PRIMITIVES)
    for name, primitive in PRIMITIVES.items():
        assert f"\n{name} " in text
        assert data[name] == primitive.summary()
        assert " ".join(data[name].split()[:4]) in " ".join(text.split())


def test_a_saved_schedule_is_applied_shown_and_verified() -> None:
    text = run("schedule", "factory:block", "right.json", "--verify", "--device", "cpu")
    assert "factory:block: Block; x 2x5x16" in text
    assert "(up): SeparateBiasLinear(in_features=16, out_features=32, bias=True)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "decompose", "*n", "1"] in [row[:4] for row in rows]
    assert ["2", "decompose", "up", "1"] in [row[:4] for row in rows]
    assert "verified: 1 output on 3 inputs in eval mode; closest output, its error " in text
    assert "verified" not in run("schedule", "factory:block", "right.json", "--device", "cpu")


def test_as_json() -> None:
    data = run_json("schedule", "factory:block", "wrong.json", "--batch", "3", "--device", "cpu")
    first, second, third = (step["code"] for step in data["steps"])
    assert first == "sch.find_all('*n').decompose()"
    assert second == "sch['up'].decompose()"
    assert third == "sch.replace(own_steps.wider, sch.find(own_steps.exact)[0])"
    assert data["verified"] is None
    verified = run_json("schedule", "factory:block", "right.json", "--verify", "--device", "cpu")["verified"]
    assert (verified["outputs"], verified["inputs"]) == (1, 3)


def test_the_step_that_breaks_it_is_named() -> None:
    error = fails("schedule", "factory:block", "wrong.json", "--verify", "--device", "cpu")
    assert error.startswith("step 3, replace in the model: output is wrong: the largest error is ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give MODEL and FILE, or --primitives"),
        (("factory:block",), "give MODEL and FILE, or --primitives"),
        (("factory:block", "no.json"), "FILE no.json: there is no such file"),
        (("factory:block", "factory.py"), "factory.py is no JSON"),
        (("--primitives", "factory:block"), "--primitives lists all of them: leave out MODEL and FILE"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], said: str) -> None:
    assert said in fails("schedule", *args)


def test_a_model_that_it_does_not_fit(folder: Path) -> None:
    (folder / "relu.json").write_text((folder / "right.json").read_text().replace('"up"', '"upp"'))
    said = fails("schedule", "factory:block", "relu.json", "--device", "cpu")
    assert said == "relu.json: step 2, decompose: 'upp': Block has no 'upp'; it has up"
