"""`burnish onnx`: what is written, what is said of it, and errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import fails, run, run_json


def test_a_submodule(folder: Path) -> None:
    data = run_json("onnx", "factory:block", "--submodule", "up", "-o", "up.onnx", "--opset", "23")
    assert data["functions"] == {"linear": 1}
    assert data["inputs"] == {"input": "float32[batch, sequence, 16]"}
    assert (data["path"], data["opset"], data["submodule"]) == ("up.onnx", 23, "up")
    assert [each["sizes"] for each in data["checked"]] == [{"batch": 2, "sequence": 5}, {"batch": 1, "sequence": 2}]
    assert (folder / "up.onnx").stat().st_size == data["bytes"]


@pytest.mark.slow
def test_a_model_without_functions_and_check(folder: Path) -> None:
    shown = run("onnx", "factory:block", "--plain", "--no-check", "--external-data")
    assert "Block; x 2x5x16" in shown
    assert "model.onnx: opset 20," in shown
    assert "weights in model.onnx.data" in shown
    assert "none: standard operators only" in shown
    assert "not at all" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "nowhere/m.onnx"), "--output nowhere/m.onnx: there is no folder"),
        (("--submodule", "middle"), "--submodule middle: this is a Block, which has norm, up, down"),
        (("--decode",), "--decode: Block is no Hugging Face model that generates"),
        (("--opset", "24"), "'--opset': Input should be less than or equal to 23"),
    ],
)
def test_errors(options: tuple[str, ...], message: str, folder: Path) -> None:
    assert message in fails("onnx", "factory:block", *options)
    assert not list(folder.glob("*.onnx"))


@pytest.mark.slow
def test_beside_what_explain_says(folder: Path) -> None:
    data = run_json("explain", "factory:block", "--onnx", "--optimize")
    assert {row["op"] for row in data["onnxruntime"]["rows"]} >= {"linear", "layer_norm"}
    assert data["onnxruntime"]["ours"].startswith("optimized")
    assert "leave out --onnx" in fails("explain", "factory:block", "--onnx", "--target", "h200")
