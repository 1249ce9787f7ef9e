"""`fast.report(args, kwargs)`: what optimizing brought, beside the model as it was."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.report import Report, after
from burnish.report.data import Explanation
from burnish.runtime.module import OptimizedModule
from tests import zoo

CASE = zoo.CASES["bert-sdpa-mask"]
INPUTS = CASE.inputs(2, 16, torch.float32)


@pytest.fixture(scope="module")
def optimized() -> OptimizedModule:
    return burnish.optimize(CASE.build(), (), INPUTS, cache="off", impls={"add_layer_norm": "torch"})


@pytest.fixture(scope="module")
def both(optimized: OptimizedModule, bert: Explanation) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after, "_SECONDS", 0.01)
        return optimized.report((), INPUTS, before=Report(explanation=bert))


def found(report: Report) -> Explanation:
    assert report.explanation is not None
    return report.explanation


def test_it_is_cheap_without_inputs(optimized: OptimizedModule) -> None:
    assert optimized.report().explanation is None


def test_before_and_after_stand_side_by_side(both: Report, bert: Explanation) -> None:
    explanation = found(both)
    assert explanation.before == bert.before
    assert explanation.after is not None
    assert [block.path for block in explanation.after.blocks] == [block.path for block in bert.before.blocks]
    layers = next(block for block in explanation.after.blocks if block.count == 2)
    ops = Counter(row.op for row in layers.rows)
    assert (ops["burnish.linear"], ops["burnish.attention"], ops["burnish.add_layer_norm"]) == (4, 1, 2)
    assert "aten.gelu" not in ops
    norm = next(row for row in layers.rows if row.op == "burnish.add_layer_norm")
    assert norm.impl == "torch"
    assert norm.us is not None
    assert "aten.native_layer_norm" in {kernel.name for kernel in norm.kernels}


def test_savings_are_predicted_and_measured(both: Report) -> None:
    explanation = found(both)
    assert explanation.after is not None
    rows = {row.name: row for block in explanation.after.blocks for row in block.rows}
    merged = next(each for each in explanation.opportunities if each.rewrite == "embedding_layer_norm")
    made = next(row for row in rows.values() if row.op == "burnish.embedding_layer_norm")
    assert merged.measured_us == made.us
    assert merged.saved_us is not None
    assert all(each.measured_us is not None for each in explanation.opportunities if not each.blocked_by)


def test_it_holds_everything(both: Report, tmp_path: Path) -> None:
    text = str(both)
    for heading in (
        "Where the time of a call goes",
        "Ops, as it was",
        "Ops, optimized",
        "What was done",
        "Calls served",
    ):
        assert heading in text
    assert "What was verified" in text
    assert max(map(len, text.splitlines())) <= 100
    data = json.loads(both.to_json(tmp_path / "r.json").read_text())
    assert data == json.loads(json.dumps(both.to_dict()))
    assert data["explanation"]["after"]["version"] == found(both).after.version  # type: ignore[union-attr]
    assert [step["name"] for step in data["steps"]] == ["capture", "raise", "fuse", "pack", "verify"]
    both.to_html(tmp_path / "r.html")


def test_where_the_original_serves_its_rival_is_shown(ceilings: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.checks import Checks

    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 1.0, "optimized": 2.0})
    monkeypatch.setattr(after, "_SECONDS", 0.01)
    fast = burnish.optimize(nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval(), cache="off")
    explanation = found(fast.report((torch.randn(2, 8),)))
    assert explanation.after is not None
    assert explanation.after.version == "optimized, not in use"
    assert any("no Impl beat the original" in note for note in explanation.notes)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if x.sum() > 0 else x


def test_what_cannot_be_captured_has_no_profile() -> None:
    report = burnish.optimize(Branching(), cache="off").report((torch.ones(2),))
    assert report.explanation is None
    assert "runs as it was" in report.summary()


def test_errors(optimized: OptimizedModule, both: Report) -> None:
    with pytest.raises(TypeError, match=r"write \(x,\) for one input"):
        optimized.report(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"before: the Report of burnish\.explain"):
        optimized.report((), INPUTS, before=optimized.report())


@pytest.mark.gpu
def test_on_cuda() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).cuda().half().eval()
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    before = burnish.explain(model, (x,))
    (whole,) = found(before).before.blocks
    assert all(row.kernels[0].grid for row in whole.rows if row.flops)
    assert found(before).before.unattributed_us > 0, "the device waits for the host"
    explanation = found(burnish.optimize(model, (x,)).report((x,), before=before))
    assert explanation.after is not None
    products = [row for block in explanation.after.blocks for row in block.rows if row.op == "burnish.linear"]
    assert len(products) == 2
    assert all(row.impl and row.kernels and row.us for row in products)
    assert not any(row.bound == "host" for row in products), "in a CUDA graph nothing waits for the host"
