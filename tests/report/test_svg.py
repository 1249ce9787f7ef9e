"""The SVG of an explanation's graphs: views and fusions told apart, names escaped, nothing that was measured in it."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.report import Report
from burnish.report.svg import render
from tests.report.explanations import gpt2, layer_after, layer_before, with_strings

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def fill_of(svg: str, title: str) -> list[str]:
    """The colours of the boxes with this title: a box is followed by its text."""
    elements = list(ElementTree.fromstring(svg).iter())
    return [
        box.attrib["fill"]
        for box, text in itertools.pairwise(elements)
        if box.tag == f"{SVG}rect" and text.tag == f"{SVG}text" and text.text == title
    ]


def test_it_counts_what_computes_and_what_is_a_view() -> None:
    before, after = layer_before().rows, layer_after().rows
    views = sum(not row.kernels for row in before)
    assert views == 4
    said = texts(render(gpt2()))
    # The pictures' input counts among the ops here.
    assert f"{len(before) + 1 - views} ops compute, 4 are views" in said
    assert f"{len(after) + 1} ops compute" in said
    assert {"As it was", "Optimized", "mlp.c_fc", "attn.c_proj"} <= set(said)


def test_what_is_only_planned_is_not_counted() -> None:
    planned = replace(gpt2(), after=None)
    assert len([text for text in texts(render(planned)) if "compute" in text]) == 1


def test_parts_of_a_fusion_have_its_colour_before_and_after() -> None:
    svg = render(gpt2())
    (tanh,), (view,) = fill_of(svg, "tanh"), fill_of(svg, "reshape")
    first, fused = fill_of(svg, "linear")
    assert fused == tanh
    assert len({first, fused, view}) == 3
    assert fill_of(svg, "attention")[0] == view


def test_names_are_escaped() -> None:
    svg = render(with_strings(gpt2(), lambda text: f'<b onload="x">{text} & "more"'))
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(svg).iter()}
    assert tags == {"svg", "defs", "marker", "path", "rect", "g", "text"}


def test_what_was_measured_is_not_in_it() -> None:
    explanation = gpt2()
    assert explanation.after is not None
    rows = tuple(replace(row, us=7 * row.shown_us, impl="other") for row in explanation.after.blocks[1].rows)
    blocks = (explanation.after.blocks[0], replace(explanation.after.blocks[1], rows=rows))
    slower = replace(explanation, after=replace(explanation.after, blocks=blocks, end_to_end_us=1e6))
    assert render(slower) == render(explanation)


def test_a_report_writes_it(tmp_path: Path) -> None:
    path = Report(explanation=gpt2()).to_svg(tmp_path / "gpt2.svg")
    assert texts(path.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="to_svg: nothing was profiled"):
        Report().to_svg(tmp_path / "nothing.svg")
