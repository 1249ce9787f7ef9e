"""`optimize()` as a Schedule: its default steps are inspected, undone in part, and continued."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.numerics import check, oracle
from burnish.runtime.module import OptimizedModule


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.LayerNorm(64)).eval()


X = torch.randn(8, 48, generator=torch.Generator().manual_seed(1))


def assert_right(fast: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        assert check(fast(X), model(X), oracle(copy.deepcopy(model).double(), X)).ok


def names(schedule: Any) -> list[str]:
    return [step.name for step in schedule.history]


def ops(fast: Any) -> list[str]:
    """What the captured model calls, and the weights that it reads."""
    return [str(node.target) for node in fast.schedule.program.graph_module.graph.nodes if node.op != "output"]


def test_the_schedule_of_an_optimized_model_has_its_default_steps(model: nn.Module) -> None:
    schedule = burnish.optimize(model, (X,), cache="off").schedule
    assert isinstance(schedule, burnish.Schedule)
    assert names(schedule) == ["capture", "raise", "fuse", "pack", "verify"]
    assert [line.split()[1] for line in str(schedule.history).splitlines() if line[:2].strip().isdigit()] == names(
        schedule
    )
    assert schedule.code().splitlines()[-1] == "sch.optimize(cache='off')"


@pytest.mark.parametrize("name", ["fuse", "linear + activation", "linear", "raise", "pack"])
def test_a_default_step_or_a_rewrite_is_undone(name: str, model: nn.Module) -> None:
    fast = burnish.optimize(model, (X,), cache="off")
    whole = ops(fast)
    assert fast.schedule.undo(name) == []
    assert_right(fast, model)
    assert "pack" not in names(fast.schedule) if name == "pack" else ops(fast) != whole
    assert f"without=({name!r},)" in fast.schedule.code()
    assert_right(fast.schedule.build(), model)
    with torch.no_grad():
        again = fast.schedule.build()
        again(X)
    assert ops(again) == ops(fast)


def test_a_name_that_is_none_changes_nothing(model: nn.Module) -> None:
    fast = burnish.optimize(model, (X,), cache="off")
    program = fast.schedule.program
    with pytest.raises(ValueError, match="no default step and no rewrite 'fusee'; there are fuse"):
        fast.schedule.undo("fusee")
    assert_right(fast, model)
    assert fast.schedule.program is program
    with pytest.raises(ValueError, match="'fuse' would be one of the default steps"):
        burnish.create_schedule(model).undo("fuse")


def test_it_is_continued_on_a_copy(model: nn.Module) -> None:
    fast = burnish.optimize(model, (X,), cache="off")
    schedule = fast.schedule
    schedule["1"].replace(nn.Tanh())
    assert type(model[1]) is nn.GELU  # type: ignore[index]
    assert_right(fast, model)
    built = schedule.build()
    assert isinstance(built, OptimizedModule)
    assert_right(built, nn.Sequential(model[0], nn.Tanh(), model[2]))  # type: ignore[index]
    assert names(schedule)[-1] == "replace"
    assert built.state_dict().keys() == model.state_dict().keys()
    assert len(schedule.undo(2)) == 2
    assert type(schedule.mod[1]) is nn.GELU  # type: ignore[index]
    with pytest.raises(ValueError, match=r"call sch.optimize\(\)"):
        _ = schedule.program


def test_as_a_step_like_others(model: nn.Module) -> None:
    schedule = burnish.create_schedule(model)
    schedule.optimize(cache="off", verify=False)
    with pytest.raises(ValueError, match="among the steps already"):
        schedule.optimize()
    with pytest.raises(ValueError, match="0 is a part"):
        schedule["0"].optimize()
    built = schedule.build()
    assert_right(built, model)
    assert names(schedule) == ["capture", "raise", "fuse", "pack"]
    schedule.undo()
    assert not isinstance(schedule.build(), OptimizedModule)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes'"),
        ({"cache": "no"}, "cache='no'"),
        ({"quantize": "int2"}, "quantize='int2'"),
        ({"impls": {"linear": "none"}}, "none"),
        ({"impls": "linear"}, "impls: Impl names by Op name are needed"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], error: str, model: nn.Module) -> None:
    schedule = burnish.create_schedule(model)
    with pytest.raises((ValueError, TypeError, LookupError), match=error):
        schedule.optimize(**arguments)
    assert not schedule.history


def test_a_copy_of_an_optimized_model_has_a_schedule_of_its_own(model: nn.Module) -> None:
    fast = burnish.optimize(model, (X,), cache="off")
    other: Any = copy.deepcopy(fast)
    other.schedule.undo("fuse")
    x: Tensor = other(X)
    assert x.shape == (8, 64)
    assert "without" not in fast.schedule.code()
