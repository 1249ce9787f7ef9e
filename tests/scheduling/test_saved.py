"""Schedules as JSON."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.scheduling import FusedLinears, VerificationError, load
from tests.scheduling import models
from tests.scheduling.models import Attention, Stack, heads, projection


def scheduled(model: nn.Module):
    sch = burnish.create_schedule(model)
    sch.find_all("layers.*.self_attn").replace(FusedLinears.with_tail(heads), projection)
    sch["layers.0"].replace(models.sdpa, sch["layers.0"].find(models.core_attention))
    sch["layers.1.self_attn"].replace(F.relu, sch["layers.1"].find("dropout")[0])
    sch.find_all("layers.*.proj.dense").decompose()
    sch.fuse(sch.find(models.bias_dropout_residual_norm), "none", name="Tail")
    sch.find_all("layers.*.proj").trace(flatten=True)
    sch["layers.1"].checkpoint()
    sch["layers.1"].annotate("stage", {"number": (1, 2.5), "of": [None, "a", True]})
    sch.replace_all(nn.Dropout, nn.Identity)
    return sch


def test_the_same_steps_again(tmp_path):
    model = Stack(2).eval()
    sch = scheduled(model)
    sch.save(tmp_path / "s.json")
    again = load(tmp_path / "s.json", model)
    assert str(again.mod) == str(sch.mod)
    assert again.code() == sch.code()
    assert again["layers.1"].annotations == {"stage": {"number": (1, 2.5), "of": [None, "a", True]}}
    x = torch.randn(2, 5, 32)
    assert torch.equal(again.build()(x), sch.build()(x))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "s.json").read_text()


def test_another_model_of_the_family(tmp_path):
    """More layers, other sizes."""
    scheduled(Stack(2)).save(tmp_path / "s.json")
    model = Stack(4).eval()
    model.layers = nn.ModuleList(Attention(64) for _ in range(4))
    x = torch.randn(2, 7, 64)
    sch = load(tmp_path / "s.json", model.eval(), (x,))
    assert sum(isinstance(module, FusedLinears) for module in sch.mod.modules()) == 4
    assert [step.matches for step in sch.history[:2]] == [12, 1]
    sch.undo(len(sch.history) - 2)
    with pytest.raises(VerificationError, match=r"^step 2, replace in layers\.0: output is wrong"):
        sch.verify()  # this one scales scores by 8 ** -0.5 whatever its width, which `sdpa` does not know
    sch.undo()
    sch.verify()


def test_results_of_several_searches(tmp_path):
    sch = burnish.create_schedule(Stack(2))
    sch.replace(models.sdpa, sch.find(models.core_attention))
    sch.save(tmp_path / "all.json")
    assert load(tmp_path / "all.json", Stack(3)).history[0].matches == 3
    sch.undo()
    found = sch.find(models.core_attention)
    sch.replace(models.sdpa, [found[1]])
    sch.save(tmp_path / "s.json")
    (step,) = json.loads((tmp_path / "s.json").read_text())["steps"]
    assert step["arguments"]["match"] == [
        {"find": {"import": "tests.scheduling.models:core_attention"}, "in": "", "index": 1}
    ]
    assert str(load(tmp_path / "s.json", Stack(2)).mod) == str(sch.mod)
    with pytest.raises(ValueError, match=r"step 1, replace: number 2 of what was found is wanted, and 1 were found"):
        load(tmp_path / "s.json", Stack(1))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda sch: sch["layers.0.proj"].replace(models.Projection()), "new cannot be saved: it is a Projection"),
        (lambda sch: sch.replace_all(nn.Dropout, lambda old: nn.Identity()), "make cannot be saved: it is <lambda>"),
        (lambda sch: sch.annotate("a", float("inf")), "value cannot be saved: JSON has no inf"),
        (lambda sch: sch.annotate("a", {1: 2}), "value cannot be saved: a dict with keys that are no texts"),
        (lambda sch: sch.annotate("a", torch.ones(2)), "value cannot be saved: it is a Tensor, which cannot be"),
        (lambda sch: sch.annotate("a", print), "value cannot be saved: print is in builtins; put it into a file"),
    ],
)
def test_what_cannot_be_said_as_data(step, said, tmp_path):
    sch = burnish.create_schedule(Stack(1))
    sch["layers.0"].trace()
    step(sch)
    with pytest.raises(ValueError, match=r"^save: step 2, ") as error:
        sch.save(tmp_path / "s.json")
    assert said in str(error.value)
    assert not (tmp_path / "s.json").exists()


def file_with(**changed):
    step = {"primitive": "trace", "path": "layers.0", "arguments": {}}
    step = {key: value for key, value in {**step, **changed}.items() if value != "left out"}
    return {"format": "burnish schedule", "version": 1, "steps": [step]}


def value(data):
    return file_with(primitive="annotate", arguments={"key": "a", "value": data})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "is no JSON: Expecting property name"),
        ("[" * 100_000, "is no JSON: "),
        ([], "is no schedule that Schedule.save wrote"),
        ({"format": "burnish schedule"}, "has version None; this Burnish reads version 1"),
        ({"format": "burnish schedule", "version": 2}, "has version 2; this Burnish reads version 1"),
        ({"format": "burnish schedule", "version": 1}, "steps must be a list"),
        ({"format": "burnish schedule", "version": 1, "steps": [3]}, "step 1: it must have a primitive, a path and"),
        (file_with(path="left out"), "step 1: it must have a primitive, a path and arguments"),
        (file_with(more=1), "step 1: it must have a primitive, a path and arguments, and nothing else"),
        (file_with(primitive="tracy"), "step 1: there is no primitive 'tracy'; there is trace"),
        (file_with(primitive=["trace"]), "step 1: there is no primitive ['trace']"),
        (file_with(path=3), "step 1: path must be a text, got 3"),
        (file_with(arguments=[]), "step 1: arguments must be a JSON object"),
        (file_with(arguments={"flat": True}), "step 1: trace has no argument 'flat'; it has flatten"),
        (file_with(primitive="annotate", arguments={"key": "a"}), "step 1: annotate needs the argument 'value'"),
        (value({"number": 1}), "step 1: value has a value that cannot be read: an object of number"),
        (value([{}]), "value has a value that cannot be read: an object of nothing"),
        (value({"tuple": 3}), "value: a tuple must be a list in JSON"),
        (value({"dict": []}), "value: a dict must be an object in JSON"),
        (value({"with_tail": "x"}), "value: with_tail must be a function"),
        (value({"find": 3, "in": ""}), "value: to find are a regular expression or a function, in a path"),
        (value({"find": "x", "in": "", "index": -1}), "value: index must be a number from 0, got -1"),
        (value({"import": "print('x')"}), "value: to import, a text like package.module:name is needed"),
        (value({"import": "torch.nn"}), "value: to import, a text like package.module:name is needed"),
        (value({"import": "no_such.place:f"}), "value: importing no_such.place raised ModuleNotFoundError"),
        (value({"import": "torch.nn:Linearr"}), "value: torch.nn has no Linearr"),
        (value({"import": "math:pi"}), "value: math:pi is no class and no function"),
        (file_with(path="layers.7"), "step 1, trace: 'layers.7': layers has no '7'; it has 0"),
        (file_with(path="blocks.*"), "step 1, trace: find_all: Stack has no submodules 'blocks.*'"),
        (
            file_with(primitive="tensor_parallel"),
            "step 1, tensor_parallel: RuntimeError: torch.distributed is not initialized",
        ),
        (file_with(path=""), None),
    ],
)
def test_files_that_are_wrong(data, said, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    model.__class__ = type("Stack", (nn.ModuleDict,), {"forward": lambda self, x: self["layers"][0](x)})
    if said is None:
        assert len(load(path, model).history) == 1
        return
    with pytest.raises(ValueError) as error:
        load(path, model)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_all_of_a_file_is_checked_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "steps_of_this_test", raising=False)
    code = "calls = []\ndef make(old):\n    calls.append(old)\n    return old\n"
    (tmp_path / "steps_of_this_test.py").write_text(code)
    arguments = {"kind": {"import": "torch.nn:Linear"}, "make": {"import": "steps_of_this_test:make"}}
    steps = [
        {"primitive": "replace_all", "path": "", "arguments": arguments},
        {"primitive": "trace", "path": "", "arguments": {"flatten": {"import": "steps_of_this_test:absent"}}},
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"format": "burnish schedule", "version": 1, "steps": steps}))
    with pytest.raises(ValueError, match="step 2: flatten: steps_of_this_test has no absent"):
        load(path, Stack(1))
    assert sys.modules["steps_of_this_test"].calls == []
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.json", Stack(1))
