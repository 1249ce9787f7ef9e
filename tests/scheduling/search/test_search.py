"""The search: what is tried, what wins, what fails, and that nothing is run twice."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.scheduling.search import SearchResult
from burnish.scheduling.search.space import Choice
from burnish.scheduling.search.trial import Trial
from tests.scheduling.search.fakes import MIB, Fake, Tiny

BATCHES = {"batch": [1, 2, 4]}


def batch(choice: Choice) -> Any:
    return choice["batch"]


def test_the_highest_throughput_wins(fake: Fake) -> None:
    fake.seconds = lambda choice: {1: 0.1, 2: 0.15, 4: 0.4}[choice["batch"]]
    result = fake.search(BATCHES, work=batch)
    assert [trial.choice["batch"] for trial in result.ranked] == [2, 1, 4]  # 13.3, 10 and 10 a second; ties keep order
    assert result.best.seconds == pytest.approx(0.15)
    assert result.best.throughput == pytest.approx(2 / 0.15)
    assert result.speedup(result.best) == pytest.approx(2 / 1.5)
    assert result.baseline is result.trials[0]


def test_a_machine_that_slows_down_changes_nothing(fake: Fake) -> None:
    """The second choice is faster, but met the machine at a third of its speed: in turn with the baseline."""
    slowness = 1.0

    def seconds(choice: Choice) -> float:
        return slowness * {1: 0.1, 2: 0.08}[choice["batch"]]

    def slow_down(trial: Trial) -> None:
        nonlocal slowness
        slowness = 3.0

    fake.seconds = seconds
    result = fake.search({"batch": [1, 2]}, on_trial=slow_down)
    assert result.best.choice == {"batch": 2}
    assert result.best.seconds == pytest.approx(0.08)


def test_the_limit_changes_the_winner_and_ordered_choices_behind_it_are_not_run(fake: Fake) -> None:
    fake.seconds, fake.mib = (lambda choice: 0.1), batch
    free = fake.search(BATCHES, work=batch)
    assert free.best.choice == {"batch": 4}
    fake.built.clear()
    limited = fake.search(BATCHES, work=batch, ordered=["batch"], memory_limit=1.5 * MIB)
    assert limited.best.choice == {"batch": 1}
    assert [trial.choice["batch"] for trial in limited.trials if trial.skipped] == [4]
    assert {choice["batch"] for choice in fake.built} == {1, 2}
    assert "not run: batch=2 had too much already" in str(limited)
    assert "over the limit" in str(limited)


def test_order_says_nothing_across_other_names(fake: Fake) -> None:
    fake.mib = lambda choice: choice["batch"] * (1 if choice["checkpoint"] else 2)
    space = {"checkpoint": [True, False], **BATCHES}
    result = fake.search(space, ordered=["batch"], memory_limit=2.5 * MIB)
    too_much = {(t.choice["checkpoint"], t.choice["batch"]) for t in result.trials if not t.fits(2.5 * MIB)}
    skipped = {(t.choice["checkpoint"], t.choice["batch"]) for t in result.trials if t.skipped}
    assert too_much == {(True, 4), (False, 2)}
    assert skipped == {(False, 4)}


def test_what_fails_is_told_and_the_search_goes_on(fake: Fake) -> None:
    def mib(choice: Choice) -> int:
        if choice["batch"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
        return 2**30 if choice["batch"] == 4 else 1

    fake.mib = mib
    result = fake.search({"match": ["whole", "nothing"], **BATCHES})
    reasons = {(t.choice["match"], t.choice["batch"]): (t.failure, t.out_of_memory) for t in result.trials}
    assert reasons == {
        ("whole", 1): ("", False),
        ("whole", 2): ("out of memory: CUDA out of memory. Tried to allocate 2 GiB.", True),
        ("whole", 4): (reasons["whole", 4][0], True),
        **{("nothing", n): ("ValueError: fuse: nothing in Tiny matches", False) for n in (1, 2, 4)},
    }
    assert reasons["whole", 4][0].startswith("out of memory: you tried to allocate 1125899906842624 bytes")


def test_where_the_baseline_does_not_fit_beside_it_a_trial_is_measured_alone(fake: Fake) -> None:
    """Of the modules alive at once, a device holds two weights' worth at most."""
    alive: list[weakref.ref[nn.Module]] = []

    def step(module: nn.Module, choice: Choice) -> None:
        fake.clock.now += 0.1 / choice["batch"]
        if all(known() is not module for known in alive):
            alive.append(weakref.ref(module))
        if choice["batch"] == 4 and sum(known() is not None for known in alive) > 1:
            raise torch.OutOfMemoryError("no room beside the other")

    result = burnish.search_schedules(Tiny, BATCHES, fake.apply, step, seconds=0.01)
    assert {trial.choice["batch"]: trial.in_turn for trial in result.trials} == {1: True, 2: True, 4: False}
    assert result.best.seconds == pytest.approx(0.025)
    assert "best, measured alone" in str(result)


def test_nothing_of_a_trial_stays(fake: Fake) -> None:
    weights: list[weakref.ref[Tensor]] = []
    alive: list[int] = []  # when the next is made

    def make() -> nn.Module:
        alive.append(sum(known() is not None for known in weights))
        model = Tiny()
        model.cycle = [model]  # a cycle, which only the collector frees
        weights.append(weakref.ref(model.fc.weight))
        return model

    space = {"match": ["a", "b", "nothing", "c"]}
    result = burnish.search_schedules(make, space, fake.apply, fake.step, seconds=0.01)
    assert [trial.worked for trial in result.trials] == [True, True, False, True]
    assert alive == [0, 1, 1, 1]  # the baseline, to run in turn
    gc.collect()
    assert [known() for known in weights] == [None] * 4


def test_a_model_that_is_given_is_copied(fake: Fake) -> None:
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(module: nn.Module, choice: Choice) -> None:
        assert torch.equal(module.fc.weight, before["fc.weight"]) or hasattr(module, "trained")
        module.trained = True
        with torch.no_grad():
            module.fc.weight.add_(1.0)
        fake.clock.now += 0.1

    result = burnish.search_schedules(model, BATCHES, fake.apply, step, seconds=0.01)
    assert all(trial.worked for trial in result.trials)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_goes_on_where_it_stopped(fake: Fake, tmp_path: Path) -> None:
    fake.seconds = lambda choice: 0.1 / choice["batch"]
    path = tmp_path / "trials.json"
    first = fake.search(BATCHES, path=path, max_trials=2)
    assert [trial.choice["batch"] for trial in first.trials] == [1, 2]
    fake.built.clear()
    second = fake.search(BATCHES, path=path)
    assert second.trials[:2] == first.trials
    assert [choice["batch"] for choice in fake.built] == [1, 4]  # the baseline, to run in turn, and what was missing
    assert second.best.seconds == pytest.approx(0.025)
    fake.built.clear()
    assert fake.search({"batch": [1, 2, 4]}, path=path).trials == second.trials
    assert fake.built == []


def test_what_was_interrupted_is_in_the_file(fake: Fake, tmp_path: Path) -> None:
    def stop(trial: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.search(BATCHES, path=tmp_path / "trials.json", on_trial=stop)
    fake.built.clear()
    fake.search({"batch": [1]}, path=tmp_path / "trials.json")
    assert fake.built == []


def test_other_code_is_another_task(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    fake.search({"batch": [1]}, path=path, work=lambda choice: 1.0)
    assert fake.search({"batch": [1]}, path=path, work=lambda choice: 2.0).best.work == 2.0
    assert fake.search({"batch": [1]}, path=path, work=lambda choice: 1.0).best.work == 1.0
    assert len(fake.built) == 2  # the third time the first is there still


def test_a_time_limit(fake: Fake) -> None:
    fake.seconds = lambda choice: 10.0
    assert len(fake.search(BATCHES, max_seconds=1.0).trials) == 1


def test_local_finds_the_best_by_lines(fake: Fake) -> None:
    best = {"a": 2, "b": 3, "c": 1}
    fake.seconds = lambda choice: 0.1 + sum(abs(choice[name] - value) for name, value in best.items())
    result = fake.search({name: [0, 1, 2, 3, 4] for name in best}, strategy="local")
    assert result.best.choice == best
    assert len(result.trials) < 30
    assert result.choices == 125


def test_the_best_choice_is_applied_to_a_model(fake: Fake) -> None:
    def apply(sch: Any, choice: Choice) -> None:
        if choice["checkpoint"]:
            sch["fc"].checkpoint()

    fake.seconds = lambda choice: 0.1 if choice["checkpoint"] else 0.2
    result = burnish.search_schedules(Tiny, {"checkpoint": [False, True]}, apply, fake.step, seconds=0.01)
    assert [step.primitive for step in result.schedule(Tiny()).history] == ["checkpoint"]


def test_where_nothing_works_the_reasons_are_told(fake: Fake) -> None:
    result = fake.search({"match": ["nothing"]})
    with pytest.raises(ValueError, match="no trial works within the limit: ValueError: fuse: nothing in Tiny"):
        _ = result.best
    assert "1 of 1 choices tried" in str(result)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"space": {}}, "space must be a dict"),
        ({"space": {"batch": []}}, r"space\['batch'\] must be a list"),
        ({"space": {"batch": "12"}}, r"space\['batch'\] must be a list"),
        ({"space": {"batch": [1, 2, 1]}}, "has a value twice"),
        ({"space": {"batch": [torch.ones(1)]}}, "a value is a finite number"),
        ({"ordered": ["width"]}, "ordered must be a list of names"),
        ({"strategy": "best"}, "strategy must be one of all, random, local"),
        ({"memory_limit": 0}, "memory_limit must be a positive number"),
        ({"seconds": float("nan")}, "seconds must be a positive number"),
        ({"step": "train"}, "step must be a function, got str"),
    ],
)
def test_arguments_that_cannot_work(changed: dict[str, Any], says: str) -> None:
    given = {"make_model": Tiny, "space": BATCHES, "apply": print, "step": print, **changed}
    with pytest.raises((TypeError, ValueError), match=says):
        burnish.search_schedules(**given)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)] for _ in range(4)]
        self.blocks = nn.ModuleList(nn.Sequential(*each) for each in layers)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_real_training_where_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks, trained. The larger batch is worth so much that it wins wherever there is room for it."""
    monkeypatch.setattr("burnish.bench._PAUSE_SECONDS", 0.0)
    x = torch.randn(512, 16)

    def apply(sch: Any, choice: Choice) -> None:
        for layer in range(int(4 * choice["checkpoint"])):
            sch[f"blocks.{layer}"].checkpoint()

    def step(module: nn.Module, choice: Choice) -> None:
        module.zero_grad()
        module(x[: choice["batch"]]).square().mean().backward()

    def search(limit: float | None) -> SearchResult:
        return burnish.search_schedules(
            Blocks,
            {"checkpoint": [1.0, 0.5, 0.0], "batch": [256, 512]},
            apply,
            step,
            work=lambda choice: choice["batch"] ** 4,
            memory_limit=limit,
            seconds=0.002,
            path=tmp_path / "trials.json",
        )

    free = search(None)
    memory = {(t.choice["checkpoint"], t.choice["batch"]): t.memory for t in free.trials}
    for rows in (256, 512):
        assert memory[1.0, rows] < memory[0.5, rows] < memory[0.0, rows]
    # Of two blocks that are not computed twice what their hidden layer makes is kept, before and after its activation.
    assert memory[0.0, 512] - memory[0.5, 512] == pytest.approx(2 * 2 * 512 * 256 * 4, rel=0.15)
    assert free.best.choice["batch"] == 512
    assert search(memory[0.5, 512] - 1).best.choice == {"checkpoint": 1.0, "batch": 512}
    assert search(memory[1.0, 512] - 1).best.choice["batch"] == 256
