"""`fast.report(args, kwargs)`: what optimizing brought, beside the model as it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import burnish
from burnish.report import Report, after
from burnish.report.data import CUDA_GRAPH, Block, Explanation
from burnish.report.fusions import Fusion
from burnish.report.rows import Rows
from burnish.runtime.module import OptimizedModule
from tests import zoo
from tests.report.explanations import gpt2

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


def test_the_ops_take_no_longer_than_the_call(both: Report) -> None:
    for profile in (found(both).before, found(both).after):
        assert profile is not None
        assert 0 <= profile.unattributed_us < profile.end_to_end_us
        assert profile.attributed_us + profile.unattributed_us == pytest.approx(profile.end_to_end_us)


def test_one_speedup_is_told(both: Report) -> None:
    """What was measured now; what was measured at the first call of these sizes says that it was."""
    explanation, text = found(both), " ".join(str(both).split())
    assert explanation.after is not None
    speedup = f"{explanation.before.end_to_end_us / explanation.after.end_to_end_us:.2f}x as fast as before"
    assert speedup in both.summary()
    assert text.count("as fast as before") == 1
    assert both.summary().endswith("rewritten values are within what eager's own error allows.")
    assert text.index("Calls served, as timed when first served") > text.index("What was done")


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
    report = fast.report((torch.randn(2, 8),))
    explanation = found(report)
    assert explanation.after is not None
    assert explanation.after.version == "optimized, not in use"
    assert any("no Impl beat the original" in note for note in explanation.notes)
    assert "and stays as it was: optimized it takes" in report.summary()


def test_a_machine_that_is_not_as_it_was_is_told() -> None:
    assert after._drifted(100.0, 110.0, 50.0) == []
    told = "The machine is busier than when the original was measured: in turns, the two take 200 us and 150 us, 1.33x."
    assert after._drifted(100.0, 200.0, 150.0) == [told]
    assert "less busy" in after._drifted(100.0, 50.0, 25.0)[0]


def test_a_block_that_took_work_over_says_so() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    add, norm = graph.call_function(torch.add, (x, x), name="add"), graph.call_function(torch.tanh, (x,), name="norm")
    fused = graph.call_function(torch.ops.burnish.add_layer_norm.default, (x,))
    row = gpt2().before.blocks[1].rows[0]

    def rows(layer_us: float, last_us: float, row_of: dict[fx.Node, tuple[str, str]]) -> Rows:
        layer, last = replace(row, us=layer_us, name="add"), replace(row, us=last_us, name="norm")
        return Rows((Block("h.*", "Layer", 2, (layer,)), Block("ln_f", "LayerNorm", 1, (last,))), row_of)

    old = rows(9.0, 3.0, {add: ("h.*", "add"), norm: ("ln_f", "norm")})
    new = rows(5.0, 4.0, {fused: ("ln_f", "norm")})
    before, later = (replace(gpt2().before, blocks=each.blocks) for each in (old, new))
    fusions = [Fusion(("add", "norm"), (fused,))]
    told = ["ln_f does some of the work of h.* now: a fused op counts where its result is."]
    assert after._moved(before, later, fusions, old, new) == told
    assert after._moved(later, before, fusions, old, new) == [], "what became faster needs no excuse"
    little = replace(before, blocks=rows(0.1, 3.0, {}).blocks)
    assert after._moved(little, later, fusions, old, new) == []


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
    graph = next(each for each in found(before).opportunities if each.rewrite == CUDA_GRAPH)
    assert 0 < graph.saves_us < found(before).before.unattributed_us
    explanation = found(burnish.optimize(model, (x,)).report((x,), before=before))
    assert explanation.after is not None
    assert explanation.after.unattributed_us >= 0
    graph = next(each for each in explanation.opportunities if each.rewrite == CUDA_GRAPH)
    assert graph.measured_us == explanation.after.unattributed_us
    products = [row for block in explanation.after.blocks for row in block.rows if row.op == "burnish.linear"]
    assert len(products) == 2
    assert all(row.impl and row.kernels and row.us for row in products)


@pytest.mark.gpu
def test_a_random_node_blocks_a_cuda_graph() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Dropout()).cuda(), torch.randn(64, 64, device="cuda")
    (graph,) = (e for e in found(burnish.explain(model, (x,))).opportunities if e.rewrite == CUDA_GRAPH)
    assert graph.blocked_by == "dropout is random"


@pytest.mark.gpu
def test_a_cuda_graph_is_measured_as_it_is_replayed() -> None:
    """Enough layers that the graph takes far longer than its launch; their kernels overlap, and add up to the call."""
    layers = [layer for _ in range(24) for layer in (nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024))]
    model, x = nn.Sequential(*layers).cuda().half().eval(), torch.randn(4096, 1024, device="cuda", dtype=torch.float16)
    fast = burnish.optimize(model, (x,))
    explanation = found(fast.report((x,)))
    after = explanation.after
    assert after is not None
    assert 0 <= after.unattributed_us < 0.25 * after.end_to_end_us
    assert after.attributed_us + after.unattributed_us == pytest.approx(after.end_to_end_us)
    assert not any("told apart" in note or "scaled" in note for note in explanation.notes), explanation.notes
    assert after.launches >= 24
    rows = {row.name for block in after.blocks for row in block.rows}
    assert {span.row for span in explanation.timeline} <= rows
    assert len(explanation.timeline) == after.launches, "of the only block"
