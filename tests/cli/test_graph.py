"""`burnish graph`: the graph after each step, with an Impl for each Op, and why a rewrite did not match."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from burnish.capture import capture
from burnish.checks import Checks
from burnish.cli import app
from burnish.cli.why import Place, _grouped, attempts
from burnish.models import load
from burnish.rewrites import FUSE, RAISE, apply
from tests.cli.running import fails, run, run_json
from tests.zoo.hugging_face import needs


@pytest.mark.parametrize(
    ("at", "counts"),
    [
        ("capture", "After capture: 13 nodes, 6 of them weights; Ops: none."),
        ("raise", "After raise: 13 nodes, 6 of them weights; Ops: 1 layer_norm, 2 linear."),
        ("fuse", "After fuse: 12 nodes, 6 of them weights; Ops: 1 layer_norm, 2 linear."),
        ("pack", "After pack: 12 nodes, 6 of them weights; Ops: 1 layer_norm, 2 linear."),
    ],
)
def test_graph_after_each_step(at: str, counts: str) -> None:
    text = run("graph", "factory:block", "--device", "cpu", "--at", at)
    assert counts in text
    assert ("aten.gelu(" in text) == (at in ("capture", "raise"))
    assert ("'gelu'" in text) == (at in ("fuse", "pack"))
    assert re.search(r"Sizes: (s\d+) is x\[0\], (s\d+) is x\[1\]\..*float32\[\1, \2, 16\]", text, re.DOTALL)


def test_graph_with_its_code() -> None:
    args = ("graph", "factory:block", "--device", "cpu", "--code")
    assert "def forward(self, " in run(*args)
    data = run_json(*args)
    assert "linear" in data["code"]
    assert [step["name"] for step in data["steps"]] == ["capture", "raise", "fuse", "pack"]
    assert {"call_function", "get_attr", "output", "placeholder"} == {node["opcode"] for node in data["nodes"]}


@pytest.mark.parametrize("at", ["capture", "pack"])
def test_drawing_colours_the_ops(at: str, folder: Path) -> None:
    pytest.importorskip("igraph", reason="drawing needs igraph")
    assert "graph.svg" in run("graph", "factory:block", "--device", "cpu", "--at", at, "--svg", "graph.svg")
    drawn = (folder / "graph.svg").read_text()
    assert "layer_norm at " in drawn
    assert "linear at " in drawn
    assert "(2 nodes)" in drawn


def test_drawing_without_igraph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)
    assert "pip install 'burnish[draw]'" in run("graph", "factory:block", "--device", "cpu", "--svg", "graph.svg")
    assert (folder / "graph.dot").is_file()
    assert not (folder / "graph.svg").exists()


def test_graph_of_a_model_that_cannot_be_captured() -> None:
    result = CliRunner().invoke(app, ["graph", "factory:data_dependent", "--device", "cpu"])
    assert (result.exit_code, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]  # torch.export may have printed what it had of the graph
    assert last.startswith("burnish: GuardOnDataDependentSymNode: ")
    assert "factory.py:" in last


def test_lowered_graph_calls_impls(untimed: None) -> None:
    args = ("graph", "factory:block", "--device", "cpu", "--at", "lower")
    text = run(*args, "--code")
    assert "After lower: 12 nodes, 6 of them weights; Ops: 1 layer_norm, 2 linear." in text
    assert "burnish.layer_norm." in text
    assert "burnish_linear_" in text.partition("def forward")[2]
    data = run_json(*args)
    steps = {step["name"]: step for step in data["steps"]}
    assert sum(steps["lower"]["matches"].values()) == 3
    chosen = {name.replace(": ", ".") for name in steps["lower"]["matches"]}
    called = [
        node["target"].removeprefix("burnish.") for node in data["nodes"] if node["target"].startswith("burnish.")
    ]
    assert set(called) == chosen


def test_lowered_graph_where_the_original_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 1.0, "optimized": 2.0})
    text = run("graph", "factory:block", "--device", "cpu", "--at", "lower")
    assert "The original runs here: no Impl beat the original." in text.replace("\n", " ")


def test_lowering_what_cannot_be_captured() -> None:
    result = CliRunner().invoke(app, ["graph", "factory:data_dependent", "--device", "cpu", "--at", "lower"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "GuardOnDataDependentSymNode" in result.stderr


# --why ----------------------------------------------------------------------------------------------------------------

GATED = """
import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


def three():
    return nn.Sequential(MLP(F.silu), MLP(F.relu), MLP(F.sigmoid), MLP(F.sigmoid)), (torch.randn(2, 5, 8),)
"""


@pytest.fixture
def gated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gated.py").write_text(GATED)
    monkeypatch.delitem(sys.modules, "gated", raising=False)


@pytest.mark.usefixtures("gated")
def test_why_tells_where_it_matched_and_what_differed_elsewhere() -> None:
    text = " ".join(run("graph", "gated:three", "--device", "cpu", "--why", "gated_mlp").split())
    assert "gated_mlp (fuse): 1 match matched at linear_default_2 (0.down, gated.py:14)" in text
    assert "(1.down, gated.py:14): all 4 nodes agree, but the gate's activation is relu" in text
    sigmoid = "3 of 4 nodes agree, but it is sigmoid where the pattern has burnish::linear"
    assert f"(2, gated.py:14) and at 1 place more: {sigmoid}" in text
    (attempt,) = run_json("graph", "gated:three", "--device", "cpu", "--why", "gated_mlp")["rewrites"]
    assert (attempt["rewrite"], attempt["step"], attempt["size"], attempt["count"]) == ("gated_mlp", "fuse", 4, 1)
    assert [(miss["module"], miss["matched"]) for miss in attempt["misses"]] == [("1.down", 4), ("2", 3), ("3", 3)]


@pytest.mark.usefixtures("gated")
def test_why_of_a_family_and_of_what_has_no_place() -> None:
    text = " ".join(run("graph", "gated:three", "--device", "cpu", "--why", "rms_norm").split())
    absent = (
        "rms_norm: rms_norm_llama; rms_norm_t5; rms_norm_float: 0 matches, there is no aten.rsqrt in the graph by then"
    )
    assert absent in text
    assert "rms_norm: rms_norm_torch: 0 matches, there is no aten.rms_norm in the graph" in text
    text = run("graph", "gated:three", "--device", "cpu", "--why", "rms_norm: rms_norm_t5")
    assert "rms_norm_llama" not in text


@pytest.mark.usefixtures("gated")
def test_looking_changes_nothing() -> None:
    loaded = load("gated:three")
    program, untouched = (capture(loaded.model, loaded.args) for _ in range(2))
    attempts(program, [*RAISE, *FUSE])
    for step, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        untouched.history.append(apply(step, rewrites, untouched.graph_module))
    steps, expected = ([(record.name, record.matches) for record in each.history] for each in (program, untouched))
    assert steps == expected
    assert str(program.graph_module.graph) == str(untouched.graph_module.graph)


@pytest.mark.usefixtures("gated")
def test_why_of_a_pass() -> None:
    (pass_,) = run_json("graph", "gated:three", "--device", "cpu", "--why", "linear + activation")["rewrites"]
    assert (pass_["count"], pass_["size"]) == (2, None)
    found = run_json("graph", "gated:three", "--device", "cpu", "--why", "linear")["rewrites"]
    assert [(each["rewrite"], each["count"]) for each in found] == [("linear: nn.Linear", 12), ("linear: Conv1D", 0)]


def test_why_one_reason_is_told_once() -> None:
    places = [
        Place(f"{'add' if i % 2 else 'mul'}_{i}", f"layers.{i}.norm", "model.py:3", 4, f"linear_{i} reads {8 + i // 9}")
        for i in range(10)
    ]
    assert [*_grouped(places, 6)] == [
        "mul_0 (layers.0.norm, model.py:3) and at 8 places more: 4 of 6 nodes agree, but linear_0 reads 8",
        "add_9 (layers.9.norm, model.py:3): 4 of 6 nodes agree, but linear_9 reads 9",
    ]


@pytest.mark.usefixtures("gated")
def test_why_counts_all_places_and_names_sizes() -> None:
    code = """


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(12))

    def forward(self, x, one):
        for norm in self.norms:
            x = norm(x + one)
        return x


def norms():
    return Norms(), (torch.randn(2, 5, 8), torch.randn(1, 5, 8))
"""
    Path("gated.py").write_text(GATED + code)
    text = " ".join(run("graph", "gated:norms", "--device", "cpu", "--why", "add_layer_norm").split())
    assert "and at 11 places more: all 2 nodes agree, but the summands have shapes (x[0], " in text
    assert not re.search(r"\bs\d+\b", text)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--why", "gated"), "--why gated: there is no such rewrite; there are: linear, gelu_tanh, gelu, layer_norm"),
        (("--why", "gated_mlp", "--code"), "--why shows no graph: leave out --svg and --code"),
    ],
)
def test_why_what(args: tuple[str, ...], said: str) -> None:
    assert said in fails("graph", "no.such.module:factory", *args)


@needs("transformers")[0]
def test_why_of_attention_that_is_captured_as_the_op(folder: Path) -> None:
    small = "vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8"
    code = f"import transformers\ndef bert():\n    return transformers.BertModel(transformers.BertConfig({small}))\n"
    (folder / "small_bert.py").write_text(code)
    text = run("graph", "small_bert:bert", "--seq", "4", "--device", "cpu", "--why", "attention")
    assert "Captured as the Op, with no rewrite to wait for: 1 attention." in text
