"""What ONNX Runtime makes of a file: its graph before and after, and its time by Op, beside Burnish's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.onnx import OnnxError
from burnish.report.data import Block, OpRow, Profile
from burnish.report.onnxruntime import OrtView, explain_onnx, view


class FeedForward(nn.Module):
    """BERT's: two products, a residual sum and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x)))).reshape(-1, 4)


def row(op: str, us: float) -> OpRow:
    return OpRow(op, op, "", "", "", (), "", "float32", 0.0, 0.0, 0.0, 0.0, "memory", us)


OURS = Profile(
    "optimized",
    "cpu",
    False,
    (
        Block(
            "layer.*", "FeedForward", 2, (row("burnish.linear", 3.0), row("burnish.linear", 4.0), row("aten.view", 1.0))
        ),
    ),
    20.0,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "ffn.onnx"
    return burnish.to_onnx(FeedForward().eval(), (torch.randn(2, 5, 16),), path).path


@pytest.fixture(scope="module")
def shown(file: Path) -> OrtView:
    return view(file, [torch.randn(2, 5, 16)], OURS)


def test_the_graph_before_and_after(shown: OrtView) -> None:
    before = {"Transpose": 2, "MatMul": 2, "Add": 3, "Gelu": 1, "LayerNormalization": 1, "Reshape": 1}
    assert {name: shown.before[name] for name in before} == before
    assert {name: shown.after[name] for name in ("BiasGelu", "SkipLayerNormalization")} == {
        "BiasGelu": 1,
        "SkipLayerNormalization": 1,
    }
    assert not shown.after.keys() & {"Transpose", "Add", "Gelu", "LayerNormalization"}


def test_times_by_op(shown: OrtView) -> None:
    """What was fused over two Ops counts for the one whose result it gives."""
    rows = {each.op: each for each in shown.rows}
    assert rows["linear"].nodes == {"MatMul": 2, "BiasGelu": 1}
    assert rows["add_layer_norm"].nodes == {"SkipLayerNormalization": 1}
    assert rows["other nodes"].nodes == {"Reshape": 1}
    assert all(0 < each.us < 1e5 for each in shown.rows)
    assert [each.us for each in shown.rows] == sorted((each.us for each in shown.rows), reverse=True)


def test_ours_beside_it(shown: OrtView) -> None:
    assert (shown.ours, shown.ours_us) == ("optimized", 20.0)
    assert {each.op: each.ours_us for each in shown.rows} == {
        "linear": 14.0,
        "other nodes": 2.0,
        "add_layer_norm": None,
    }


def test_it_prints(shown: OrtView) -> None:
    text = str(shown)
    assert "a call; optimized: 20 us." in text
    assert "1 SkipLayerNormalization" in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(json.dumps(shown.to_dict()))["rows"][0]["op"] == shown.rows[0].op


def test_inputs_that_do_not_fit(file: Path) -> None:
    with pytest.raises(OnnxError, match=r"ONNX Runtime fails on x \[2, 5, 17\]"):
        view(file, [torch.randn(2, 5, 17)])


@pytest.mark.slow
def test_explain_onnx() -> None:
    shown = explain_onnx(FeedForward().eval(), (torch.randn(2, 5, 16),), opset=23)
    assert (shown.file, shown.ours) == ("FeedForward.onnx", None)
    assert "ours" not in str(shown)
