"""Every command on tiny models: its good path, and what it says when something is wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import burnish
import burnish.demo
from burnish.checks import Checks
from burnish.cli import app
from burnish.cli.app import one_line
from burnish.models import ModelError
from burnish.op import OPS
from tests.cli.running import fails, run, run_json

# The command itself ---------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    for text in (run(), run("--help"), run("-h")):
        assert all(name in text for name in ("demo", "optimize", "graph", "bench", "isolate", "ops", "device"))


def test_version() -> None:
    assert run("--version") == f"burnish {burnish.__version__}\n"


def test_python_m_burnish_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", "polish"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("burnish", run_name="__main__")
    assert capsys.readouterr().err == "burnish: No such command 'polish' (see burnish --help)\n"


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
    assert reason in " ".join(run("ops", "--device", "cpu").split())
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
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 1.0, "optimized": 2.0})
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
