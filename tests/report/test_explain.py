"""`burnish.explain`: where the time goes, what could be fused, and a model that stays as it was."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.capture import CaptureError
from burnish.report import Report
from burnish.report.data import Block, Explanation, OpRow
from burnish.report.explain import captured_as_called, notes_on
from burnish.report.measure import flat
from burnish.report.timing import Times
from burnish.report.walk import Walk
from tests import zoo
from tests.report import explanations
from tests.slow import slow

SECONDS = 0.01  # of measuring: what is looked at is not how long things take


def rows(explanation: Explanation) -> dict[str, OpRow]:
    return {row.name: row for block in explanation.before.blocks for row in block.rows}


def blocks(explanation: Explanation) -> dict[str, Block]:
    return {block.path: block for block in explanation.before.blocks}


# --- sums -------------------------------------------------------------------------------------------------------------


def test_the_whole_call_is_accounted_for(bert: Explanation) -> None:
    profile = bert.before
    assert not profile.predicted
    assert profile.attributed_us == pytest.approx(sum(block.us * block.count for block in profile.blocks))
    assert profile.attributed_us + profile.unattributed_us == profile.end_to_end_us
    assert 0 < profile.floor_us <= profile.attributed_us
    for row in rows(bert).values():
        assert row.us is not None
        assert row.us >= row.floor_us >= 0
        assert math.isclose(sum(kernel.us for kernel in row.kernels), row.us) or not row.kernels


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_layers_that_are_alike_are_one_block(bert: Explanation, gpt2: Explanation, llama: Explanation) -> None:
    assert [(b.path, b.kind, b.count) for b in bert.before.blocks] == [
        ("embeddings", "BertEmbeddings", 1),
        ("", "BertModel", 1),
        ("encoder.layer.*", "BertLayer", 2),
        ("pooler", "BertPooler", 1),
    ]
    layers = blocks(gpt2)["transformer.h.*"]
    assert (layers.count, layers.kind) == (2, "GPT2Block")
    assert list(blocks(gpt2))[-2:] == ["transformer.ln_f", "lm_head"]
    layers = blocks(llama)["model.layers.*"]
    products = [row.module for row in layers.rows if row.op == "aten.linear"]
    assert (layers.count, len(products), products[0]) == (2, 7, "self_attn.q_proj")


def test_a_model_without_layers_is_one_block(block: Explanation) -> None:
    (whole,) = block.before.blocks
    assert (whole.path, whole.kind, whole.count) == ("", "DecoderBlock", 1)
    assert {row.module for row in whole.rows} >= {"", "attention", "attention.qkv_proj", "norm1"}


# --- ops --------------------------------------------------------------------------------------------------------------


def test_an_op_says_where_it_comes_from_and_what_it_does(gpt2: Explanation) -> None:
    product = next(row for row in blocks(gpt2)["transformer.h.*"].rows if row.module == "mlp.c_fc" and row.flops)
    assert product.op == "aten.addmm"
    assert product.source.startswith("pytorch_utils.py:")
    assert "torch.addmm" in product.code
    assert product.inputs == ("float32[256]", "float32[32, 64]", "float32[64, 256]")
    assert (product.output, product.dtype) == ("float32[32, 256]", "float32")
    assert product.flops == 2 * 32 * 64 * 256
    assert product.bytes == 4 * (256 + 32 * 64 + 64 * 256 + 32 * 256)
    assert [kernel.name for kernel in product.kernels] == ["aten.addmm"]


def test_attention_is_what_the_model_calls(gpt2: Explanation, bert: Explanation) -> None:
    for explanation, layers in ((gpt2, "transformer.h.*"), (bert, "encoder.layer.*")):
        (attention,) = (row for row in blocks(explanation)[layers].rows if "attention" in row.op)
        assert attention.op == "aten.scaled_dot_product_attention"
        assert any(kernel.name.startswith("aten._scaled_dot_product") for kernel in attention.kernels)


@pytest.mark.parametrize("name", ["llama-sdpa-mask", "gpt2-eager-mask", slow("bert-sdpa-mask"), slow("qwen3")])
def test_the_walk_computes_what_the_model_does(name: str) -> None:
    case = zoo.CASES[name]
    model, inputs = case.build(), case.inputs(2, 16, torch.float32)
    with torch.no_grad():
        program, functions = captured_as_called(model, (), inputs)
        outputs = Walk(program.captured, functions)(
            flat((), inputs), lambda node, run, args, kwargs: run(*args, **kwargs)
        )
        expected = flat((model(**inputs),), {})
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- what could be fused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "name"),
    [("bert", "bert-sdpa-mask"), ("gpt2", "gpt2-sdpa"), ("llama", "llama-sdpa"), ("block", "notebook-block-post")],
)
def test_every_place_is_told(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    """As many as the zoo says that there are in the model."""
    told = Counter[str]()
    for each in request.getfixturevalue(fixture).opportunities:
        told[each.rewrite] += 0 if each.blocked_by else each.count
    case = zoo.CASES[name]
    held = Counter(case.outside)
    for stack in case.stacks:
        held.update({op: count * stack.layers for op, count in stack.ops.items()})
    assert told["add_layer_norm"] + told["add_rms_norm"] == held["residual"]
    assert told["linear + activation"] == held["activation"]
    assert told["gated_mlp"] == held["gated_mlp"]
    assert 2 * told["rope_qk"] == held["rope"]
    assert told["embedding_layer_norm"] == held["embedding_layer_norm"]


def test_a_fusion_tells_what_it_takes(bert: Explanation) -> None:
    by_rewrite = {each.rewrite: each for each in bert.opportunities if each.count > 1}
    merged = by_rewrite["parallel linears"]
    assert (merged.op, merged.block, merged.count) == ("burnish.linear", "encoder.layer.*", 2)
    assert [rows(bert)[name].module for name in merged.nodes] == [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ]
    assert merged.before_us == pytest.approx(sum(rows(bert)[name].us or 0.0 for name in merged.nodes), rel=0.01)
    assert 0 < merged.after_us <= merged.before_us
    assert [rows(bert)[name].op for name in by_rewrite["linear + activation"].nodes] == ["aten.linear", "aten.gelu"]


def test_a_fusion_is_named_after_the_rewrite_that_made_it(block: Explanation, llama: Explanation) -> None:
    """Not after a later one that only took a mask in, nor after the raising of a part."""
    (attention,) = (each for each in block.opportunities if each.op == "burnish.attention")
    assert attention.rewrite == "attention: softmax, over, filled"
    assert "aten.eq" in [rows(block)[name].op for name in attention.nodes]
    assert {each.rewrite for each in llama.opportunities if each.op == "burnish.add_rms_norm"} == {"add_rms_norm"}


def test_a_near_miss_has_its_reason(gpt2: Explanation) -> None:
    (miss,) = (each for each in gpt2.opportunities if each.blocked_by)
    assert miss.rewrite == "add_layer_norm"
    assert [rows(gpt2)[name].op for name in miss.nodes] == ["aten.add", "aten.layer_norm"]
    assert miss.blocked_by == "the summands have shapes (input_ids[0], input_ids[1], 64) and (1, input_ids[1], 64)"


def test_the_costliest_block_is_drawn(gpt2: Explanation) -> None:
    before, after = gpt2.pictures
    assert before.title.startswith("transformer.h.*")
    names = {name for name, _, _ in before.nodes}
    assert all(source in names and user in names for source, user in before.edges)
    groups = {group: {op for _, op, g in before.nodes if g == group} for _, _, group in before.nodes if group}
    assert {"aten.addmm", "aten.tanh"} <= next(ops for group, ops in groups.items() if group.startswith("linear"))
    assert {group for _, _, group in after.nodes} & groups.keys()
    assert "burnish.add_layer_norm" in {op for _, op, _ in after.nodes}
    spans = gpt2.timeline
    assert {span.row for span in spans} <= names
    assert all(a.start_us + a.us <= b.start_us + 1e-6 for a, b in itertools.pairwise(spans))
    assert "add_layer_norm" in gpt2.code


# --- the report -------------------------------------------------------------------------------------------------------


def test_it_is_a_report(bert: Explanation, tmp_path: Path) -> None:
    report = Report(explanation=bert)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "encoder.layer.* (2 x BertLayer)" in text
    assert report.summary() in " ".join(text.split())
    data = json.loads(report.to_json(tmp_path / "r.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert (data["schema"], data["model"], data["steps"]) == (4, "BertModel", [])
    profile = data["explanation"]["before"]
    assert profile["unattributed_us"] == pytest.approx(bert.before.unattributed_us)
    assert profile["blocks"][2]["rows"][0]["op"] == "aten.linear"
    for write, start in (
        (report.to_html, "<!doctype html>"),
        (report.to_markdown, "BertModel"),
        (report.to_trace, "{"),
    ):
        assert write(tmp_path / "file").read_text().lower().startswith(start.lower())


def test_without_a_profile_there_is_nothing_to_draw(tmp_path: Path) -> None:
    report = burnish.optimize(nn.Linear(4, 4).eval()).report()
    with pytest.raises(ValueError, match="to_html: nothing was profiled"):
        report.to_html(tmp_path / "r.html")


# --- the model stays as it was ----------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A model in training mode: batch norm counts, dropout draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(x)))


def test_nothing_is_changed() -> None:
    model, x = Counting().train(), torch.randn(4, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
    attributes, random = set(vars(model)), torch.get_rng_state()
    found = burnish.explain(model, (x,), seconds=SECONDS).explanation
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == pointers
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(model)) == attributes
    assert model.training
    assert found is not None
    assert any("training mode" in note for note in found.notes)


def test_what_is_faster_than_its_floor_is_accounted_for() -> None:
    def notes(bound: str) -> str:
        row = next(row for block in explanations.gpt2().before.blocks for row in block.rows if row.us and row.bytes)
        row = replace(row, bound=bound, floor_us=row.us)  # type: ignore[arg-type]
        profile = replace(explanations.gpt2().before, blocks=(Block("", "Linear", 1, (row,)),))
        return " ".join(notes_on(profile, Times(1.0, 1.0, {}, 3), nn.Identity().eval()))

    assert "in a cache" in notes("memory")
    assert "--refresh" not in notes("memory")
    assert "--refresh" in notes("compute")


def test_what_the_times_are_of(bert: Explanation) -> None:
    assert (bert.dtype, bert.torch) == ("float32", torch.__version__)
    assert bert.before.calls >= 3


# --- errors -----------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if x.sum() > 0 else x


class Cache:
    def get_seq_length(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: burnish.explain(3, (torch.ones(2),)), TypeError, "model: an nn.Module is needed, not int"),
        (lambda: burnish.explain(nn.Linear(2, 2), torch.ones(2)), TypeError, "write (x,) for one input"),
        (lambda: burnish.explain(nn.Linear(2, 2), (torch.ones(1, 3),)), RuntimeError, "shapes cannot be multiplied"),
        (lambda: burnish.explain(Branching(), (torch.ones(2),)), CaptureError, "test_explain.py"),
        (lambda: burnish.explain(nn.Linear(2, 2), (torch.ones(1, 2),), target="h300"), ValueError, "there are: a100"),
        (lambda: burnish.explain(nn.Linear(2, 2), (), {"input": Cache()}), ValueError, "input: a cache grows"),
        (
            lambda: burnish.explain(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2, device="meta"),)),
            ValueError,
            "model: it is on the meta device",
        ),
        (
            lambda: burnish.explain(burnish.optimize(nn.Linear(2, 2)), (torch.ones(1, 2),)),
            TypeError,
            "its report(args, kwargs) tells",
        ),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# --- how fast and how exact -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bert_base_in_time() -> None:
    """Under 10 s on an idle machine; and the ops add up to the call within 5%."""
    case = zoo.BIG["bert-base"]
    model, inputs = case.build(), case.inputs(1, 128, torch.float32)
    started = time.perf_counter()
    found = burnish.explain(model, (), inputs).explanation
    assert time.perf_counter() - started < 10
    assert found is not None
    assert abs(found.before.unattributed_us) < 0.05 * found.before.end_to_end_us
