"""Choosing inside the whole model: here with a stopwatch that the test holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from burnish import in_model, tuning
from burnish.capture import capture
from burnish.choose import Chosen, Seen, choose_by_measuring
from burnish.in_model import Contest, Functions, ModelContest, choose_in_model
from burnish.op import OPS
from burnish.prepare import Prepared, Preparer
from burnish.runtime.module import Call
from burnish.tuning import Tuner
from tests import zoo

LINEAR = OPS["linear"]


@pytest.fixture(autouse=True)
def fixed_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an Op's Impls the first is measured as 100 us, and each other as 10 % slower; storage stays as it is."""

    def measure(functions: Any, *_: Any, **__: Any) -> dict[str, float]:
        return {name: 100 * 1.1**i for i, name in enumerate(functions)}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        tuning, "measure", lambda functions, *_, **__: {n: 100 * 1.1**i for i, n in enumerate(functions)}
    )
    monkeypatch.setattr(Tuner, "prefers_transposed", lambda *_, **__: False)


def measured() -> tuple[Prepared, Chosen, Seen, Tuner]:
    case = zoo.CASES["bert-sdpa-mask"]
    model, inputs, tuner = case.build(), case.inputs(2, 16, torch.float32), Tuner()
    leaves, spec = pytree.tree_flatten(((), inputs))
    call = Call((), inputs, leaves, spec)
    prepared = Preparer(model, tuner).prepare(capture(model, (), inputs))
    return prepared, *choose_by_measuring(prepared, call, tuner), tuner


def linear_impls(prepared: Prepared, chosen: Chosen) -> set[str]:
    return {chosen.choices[slot.name].impl for slot in prepared.executable.slots if slot.op is LINEAR}


def stopwatch(favourite: Callable[..., Any], asked: list[Any]) -> Contest:
    def time_us(functions: Functions) -> float:
        return 10_000.0 - 50.0 * sum(function is favourite for function in functions.values())

    def contest(champion: Functions, rival: Functions) -> tuple[float, float]:
        asked.append(rival)
        return time_us(champion), time_us(rival)

    return contest


def test_what_is_faster_in_the_model_is_taken_and_remembered() -> None:
    prepared, chosen, seen, tuner = measured()
    first = linear_impls(prepared, chosen)
    rival = next(name for name in ("torch", "onednn") if name not in first)
    choose_in_model(prepared, chosen, seen, tuner, stopwatch(LINEAR.impls[rival].fn, []))
    assert linear_impls(prepared, chosen) == {rival}
    slots = [slot for slot in prepared.executable.slots if slot.op is LINEAR]
    assert all(chosen.functions[slot.name] is LINEAR.impls[rival].fn for slot in slots)
    choice = chosen.choices[slots[0].name]
    assert next(iter(choice.in_model_us)) == rival
    assert choice.in_model_us[rival] < choice.in_model_us[next(iter(first))]

    tuner.save()
    prepared, later, seen, tuner = measured()
    assert linear_impls(prepared, later) == {rival}
    assert {later.choices[slot.name].source for slot in prepared.executable.slots} == {"cached"}
    asked: list[Any] = []
    choose_in_model(prepared, later, seen, tuner, stopwatch(LINEAR.impls[rival].fn, asked))
    assert not asked  # what was remembered is not tried again


def test_no_rival_is_tried_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, chosen, seen, tuner = measured()
    clock = iter(range(0, 1000, 5))  # each look at it is 5 seconds later, and there are 6
    rivals = Tuner.rivals
    monkeypatch.setattr(Tuner, "rivals", lambda *args: 3 * rivals(*args))
    monkeypatch.setattr(in_model.time, "perf_counter", lambda: next(clock))
    asked: list[Any] = []
    choose_in_model(prepared, chosen, seen, tuner, stopwatch(LINEAR.impls["torch"].fn, asked))
    assert len(asked) == 1


@pytest.mark.parametrize("gain_us", [40.0, 5000.0], ids=["less than noise", "more than the kernels take"])
def test_noise_changes_nothing(gain_us: float) -> None:
    prepared, chosen, seen, tuner = measured()
    before = dict(chosen.functions)
    choose_in_model(prepared, chosen, seen, tuner, lambda champion, rival: (10_000.0, 10_000.0 - gain_us))
    assert chosen.functions == before
    assert all(next(iter(c.in_model_us), c.candidate) == c.candidate for c in chosen.choices.values())


def test_what_takes_no_more_than_noise_has_no_turn() -> None:
    prepared, chosen, seen, tuner = measured()
    asked: list[Any] = []

    def contest(champion: Functions, rival: Functions) -> tuple[float, float]:
        asked.append({name for name in rival if rival[name] is not champion[name]})
        return 1e6, 1e6

    choose_in_model(prepared, chosen, seen, tuner, contest)
    most = max(Counter(seen.keys[slot.name] for slot in prepared.executable.slots).values())
    assert {len(slots) for slots in asked} == {most}


def test_a_model_that_cannot_be_captured_keeps_its_choices() -> None:
    prepared, chosen, seen, tuner = measured()
    before, asked = dict(chosen.choices), []

    def fails(champion: Functions, rival: Functions) -> tuple[float, float]:
        asked.append(rival)
        return float("inf"), float("inf")

    choose_in_model(prepared, chosen, seen, tuner, fails)
    assert chosen.choices == before
    assert len(asked) == 1


def test_no_time_is_spent_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, chosen, seen, tuner = measured()
    monkeypatch.setattr("burnish.in_model._BUDGET_SECONDS", 0.0)
    asked: list[Any] = []
    choose_in_model(prepared, chosen, seen, tuner, stopwatch(LINEAR.reference, asked))
    assert not asked


class Graph:
    """What is captured as `run`, and how long a replay of it takes."""

    def __init__(self, us: float) -> None:
        self.us = us

    def replay(self) -> None: ...


def test_a_warm_device_slows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, *_ = measured()
    captured: list[str] = []
    heat = iter([1.0 + i / 100 for i in range(1000)])

    class Memory:
        def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
            run()
            captured.append(running[0])
            if running[0] == "broken":
                raise RuntimeError("no graph can hold this")
            return Graph({"mine": 1000.0, "slower": 1004.0, "faster": 990.0}[running[0]]), None

    def by(name: str) -> Functions:
        def function(*args: Any) -> Any:
            running[0] = name
            return LINEAR.reference(*args)

        return {slot.name: function for slot in prepared.executable.slots if slot.op is LINEAR}

    running = [""]
    monkeypatch.setattr(in_model, "GraphMemory", Memory)
    monkeypatch.setattr(in_model, "replay_us", lambda graph, replays: graph.us * next(heat))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = zoo.CASES["bert-sdpa-mask"]
    inputs = case.inputs(2, 16, torch.float32)
    leaves, spec = pytree.tree_flatten(((), inputs))
    contest = ModelContest(prepared, case.build(), Call((), inputs, leaves, spec))
    mine, faster = by("mine"), by("faster")
    champion_us, rival_us = contest(mine, by("slower"))
    assert champion_us * 0.9 < rival_us < champion_us * 1.05
    assert contest(mine, by("broken"))[1] == float("inf")
    champion_us, rival_us = contest(mine, faster)
    assert rival_us < champion_us
    contest(faster, by("slower"))
    assert captured == ["mine", "slower", "broken", "faster", "slower"]  # who goes on is not captured again
