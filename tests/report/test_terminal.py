"""On a terminal: within 100 columns, sums that add up, short for long models, names as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from burnish._text import plain
from burnish.report import terminal
from burnish.report.data import Explanation, Opportunity
from tests.report.explanations import gpt2, predicted, with_graph, with_strings


def text_of(explanation: Explanation) -> str:
    return plain(*terminal.render(explanation), width=100)


def line_with(text: str, start: str) -> list[str]:
    """The words of the one line that starts so."""
    [line] = [line for line in text.splitlines() if re.match(rf"{re.escape(start)}(\s|$)", line)]
    return line.split()


@pytest.mark.parametrize(
    "explanation",
    [
        with_graph(gpt2()),
        gpt2(after=False),
        predicted(),
        with_strings(gpt2(), lambda text: text + "_and_a_long_tail" * 8),
    ],
    ids=["both", "before", "predicted", "long names"],
)
def test_fits_100_columns(explanation: Explanation) -> None:
    lines = text_of(explanation).splitlines()
    assert max(map(len, lines)) <= 100
    # Columns that collapse show it in their headings.
    assert not [line for line in lines if re.search(r"of fl…|kern…|sourc…", line)]


def test_blocks_alone_add_up() -> None:
    text = text_of(gpt2(after=False))
    times = [3875.1, 6.7, 705.6, 3.2, 29.4]
    assert line_with(text, "unattributed")[1] == "3,875.1"
    assert line_with(text, "transformer.h.* (12 x GPT2Block)  ")[-5:] == ["705.6", "15%", "97.7", "14%", "204"]
    assert line_with(text, "end to end")[-5:] == [f"{sum(times):,.1f}", "100%", "119.7", "2.6%", "209"]


def test_before_and_after_side_by_side() -> None:
    text = text_of(gpt2())
    assert line_with(text, "transformer.h.* (12 x GPT2Block)  ")[-7:] == [
        "705.6",
        "276.0",
        "2.56x",
        "19%",
        "204",
        "->",
        "60",
    ]
    assert line_with(text, "end to end")[-7:] == ["4,620.0", "371.0", "12.45x", "20%", "209", "->", "65"]
    assert text.index("Ops, as it was") < text.index("Ops, optimized")


def test_an_op_has_its_source_shape_share_and_bound() -> None:
    words = ["linear", "mlp.c_fc", "pytorch_utils.py:116", "f16[1,128,3072]", "4.6", "30%", "launch", "1"]
    assert words in [line.split() for line in text_of(gpt2()).splitlines()]


def test_the_rest_is_summed_up() -> None:
    text = text_of(gpt2(after=False))
    assert re.search(r"^13 more ops +19\.9$", text, re.MULTILINE)
    assert "2 more blocks, 9.9 us (0.2% of the call)" in text


def test_a_long_model_does_not_flood() -> None:
    found = gpt2(after=False)
    block = found.before.blocks[1]
    blocks = tuple(replace(block, path=f"layer.{i}", count=1, rows=block.rows * 40) for i in range(40))
    text = text_of(replace(found, before=replace(found.before, blocks=blocks), opportunities=found.opportunities * 30))
    assert len(text.splitlines()) < 140
    assert "36 more blocks" in text


def test_rewrites_by_what_they_save_and_what_blocks_them() -> None:
    text = text_of(gpt2())
    shown = text[text.index("What was fused") :]
    assert [line.split()[-1] for line in shown.splitlines()[2:6]] == ["234.0", "66.0", "42.0", "34.8"]
    blocked = "blocked gated_mlp, 12 x in transformer.h.*: gelu_tanh: is burnish::gelu_tanh where the pattern has mul"
    assert blocked in shown.replace("\n", " ")


def test_a_cuda_graph_stands_first_where_it_saves_most() -> None:
    text = text_of(with_graph(gpt2(after=False)))
    words = text[text.index("What can be fused") :].splitlines()[2].split()
    assert words == ["CUDA", "graph", "one", "launch", "the", "whole", "call", "3,867.1"]


def test_how_to_get_it() -> None:
    said = "fast = burnish.optimize(model) does all of this; fast.report(args) measures it."
    assert said in text_of(gpt2(after=False)).splitlines()
    assert "burnish.optimize" not in text_of(gpt2())


def test_an_op_that_two_rewrites_take_and_a_faster_kernel() -> None:
    found = gpt2(after=False)
    head = Opportunity("linear: nn.Linear", "burnish.linear", "lm_head", 1, ("linear",), 900.0, 25.0)
    text = text_of(replace(found, opportunities=(head, head)))
    assert "linear, faster kernel " in text
    assert "An op that two rewrites take counts once in the sums at the top." in text


def test_names_are_no_markup() -> None:
    text = text_of(with_strings(gpt2(), lambda text: "[red]" + text))
    assert "[red]GPT2LMHeadModel takes 371 us" in text
    assert "[red]linear" in text


def test_an_explanation_of_nothing() -> None:
    found = gpt2(after=False)
    empty = Explanation("Empty", (), replace(found.before, blocks=(), end_to_end_us=0.0))
    assert "Inputs: none" in text_of(empty)
