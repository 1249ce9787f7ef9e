"""`burnish isolate`, and the folders that it writes as the MODEL of other commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from burnish.models import Wanted, load
from tests.cli.running import fails, run, run_json
from tests.zoo.hugging_face import needs

NESTED = """
import torch
from torch import nn
from factory import Block


def model(batch=2):
    return nn.Sequential(nn.LayerNorm(16), Block(), nn.Linear(16, 4)), (torch.randn(batch, 5, 16),)
"""


@pytest.fixture(autouse=True)
def nested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nested.py").write_text(NESTED)
    monkeypatch.delitem(sys.modules, "nested", raising=False)


def test_a_layer_of_torch(folder: Path) -> None:
    text = run("isolate", "nested:model", "2", "--device", "cpu", "--to", "head")
    assert "Submodule 2 of nested:model: Linear, 68 parameters (272 B)." in text
    assert "Its inputs there: input 2x5x16." in text
    assert "burnish bench head --plot plot.svg" in text
    assert "head: Linear, submodule 2 of Sequential; input 2x5x16" in run("graph", "head", "--device", "cpu")
    assert sorted(file.name for file in (folder / "head").iterdir()) == [
        "inputs.safetensors",
        "isolated.json",
        "weights.safetensors",
    ]


def test_code_of_ones_own_needs_the_factory(folder: Path, untimed: None) -> None:
    data = run_json("isolate", "nested:model", "1", "--device", "cpu", "--batch", "3")
    assert (data["class"], data["needs_factory"], data["inputs"]) == ("Block", True, ["x 3x5x16"])
    assert "burnish explain 1 --factory nested:model" in run("isolate", "nested:model", "1", "--device", "cpu")
    for command in ("optimize", "graph", "bench"):
        said = fails(command, "1", "--device", "cpu")
        assert said == (
            "1 holds the weights of Block, whose code is not in it: give --factory, the package.module:function that "
            "builds Sequential around it"
        )
    args = ("1", "--device", "cpu", "--factory", "nested:model")
    assert "Block, submodule 1 of Sequential" in run("optimize", *args)
    assert "Block, submodule 1 of Sequential" in run("graph", *args)
    assert "Block, submodule 1 of Sequential" in run("bench", *args, "--seconds", "0.01")


def test_a_folder_names_no_code_to_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("isolate", "nested:model", "1", "--device", "cpu", "--to", "part")
    for name in ("nested", "factory"):
        monkeypatch.delitem(sys.modules, name)
    fails("graph", "part")
    assert not {"nested", "factory"} & set(sys.modules)


@needs("transformers")[0]
def test_a_part_of_a_hugging_face_model(folder: Path) -> None:
    small = "vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=16"
    code = f"import transformers\ndef gpt2():\n    return transformers.GPT2Model(transformers.GPT2Config({small}))\n"
    (folder / "small_gpt2.py").write_text(code)
    assert not run_json("isolate", "small_gpt2:gpt2", "h.0.mlp", "--seq", "4", "--device", "cpu")["needs_factory"]
    loaded = load("h.0.mlp", Wanted(dtype=torch.bfloat16))
    assert loaded.origin == "GPT2MLP, submodule h.0.mlp of GPT2Model"
    assert (loaded.args[0].shape, loaded.args[0].dtype) == ((1, 4, 8), torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


PAIR = """
import torch
from torch import nn


class Inner(nn.Module):
    def forward(self, x, *, tables, flag=None, how=1):
        return x + tables[0]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x, tables=(x, x.sum()), flag=None, how=2)


def pair():
    return Outer(), (torch.randn(2, 3),)
"""


def test_inputs_inside_of_inputs_have_names(folder: Path) -> None:
    (folder / "pair.py").write_text(PAIR)
    text = run("isolate", "pair:pair", "inner", "--device", "cpu")
    assert "Its inputs there: x 2x3, tables[0] 2x3, tables[1] scalar, how=2." in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("isolate", "nested:model", "1.upp"), "PATH 1.upp: 1 is a Block, which has norm, up, down"),
        (("graph", "head", "--seq", "4"), "--seq: head comes with the inputs that it got inside its model"),
        (("graph", "head", "--factory", "nested:mode"), "nested has no function 'mode'; did you mean model?"),
        (
            ("graph", "nested:model", "--factory", "nested:model"),
            "--factory: it is for a folder that `burnish isolate`",
        ),
        (("isolate", "nested:model", "2", "--to", "."), "--to . holds something else; give a new one"),
        (("isolate", "no.such:model", "2", "--to", "nested.py"), "--to nested.py is a file; give a new folder"),
        (
            ("graph", "head", "--factory", "factory:block"),
            "--factory factory:block: this is a Block, which has norm, up, down, and no 2",
        ),
    ],
)
def test_what_cannot_be(args: tuple[str, ...], said: str) -> None:
    run("isolate", "nested:model", "2", "--device", "cpu", "--to", "head")
    assert said in fails(*args, "--device", "cpu")


def test_a_damaged_folder(folder: Path) -> None:
    run("isolate", "nested:model", "2", "--device", "cpu", "--to", "head")
    (folder / "head" / "isolated.json").write_text("{")
    assert "isolated.json is no JSON" in fails("graph", "head", "--device", "cpu")
