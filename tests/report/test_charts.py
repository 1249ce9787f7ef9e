"""The page's charts: a point is as far under the roof as its op is from its floor; kernels do not cover each other."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest

from burnish.report import charts, pictures
from burnish.report.data import Explanation, GraphPicture, Profile, Span
from tests.report.explanations import FLOPS_PER_US, gpt2, predicted


class Everything:
    """A container of every id."""

    def __contains__(self, name: object) -> bool:
        return True


ALL = Everything()


def with_large_product() -> Explanation:
    """One op more, which its arithmetic bounds."""
    found = gpt2(after=False)
    head = found.before.blocks[-1]
    large = replace(head.rows[0], name="large", flops=1e12, floor_us=1e12 / FLOPS_PER_US, us=2e12 / FLOPS_PER_US)
    blocks = (*found.before.blocks[:-1], replace(head, rows=(*head.rows, large)))
    return replace(found, before=replace(found.before, blocks=blocks))


def test_roofs_are_the_ceilings_of_the_dtypes_that_are_computed_in() -> None:
    found = charts.roofline(gpt2(), ALL, {})
    assert found is not None
    assert [roof.label for roof in found.roofs] == ["4.2 TB/s memory", "776 TFLOP/s float16"]
    unknown = replace(gpt2(after=False).before, bandwidth_gbs=0.0)
    assert charts.roofline(replace(gpt2(), before=unknown), ALL, {}) is None


@pytest.mark.parametrize(
    "explanation", [gpt2(), with_large_product(), predicted()], ids=["both", "compute", "predicted"]
)
def test_a_point_is_as_far_under_the_roof_as_its_op_from_its_floor(explanation: Explanation) -> None:
    found = charts.roofline(explanation, ALL, {})
    assert found is not None
    decade = found.y_ticks[0].at - found.y_ticks[1].at  # percent of the plot
    rows = {
        id_: row
        for profile in (explanation.before, explanation.after)
        if profile
        for id_, _, row in charts.identified(profile, profile is explanation.after)
    }
    assert {point.row for point in found.points} == {id_ for id_, row in rows.items() if row.shown_us and row.bytes}
    for point in found.points:
        row = rows[point.row]
        assert point.y - roof_at(found, point.x) == pytest.approx(-decade * math.log10(row.share_of_floor), abs=0.02)
        assert 0 <= point.x <= 100
        assert 0 <= point.y <= 100


def roof_at(found: charts.Roofline, x: float) -> float:
    memory, *flat = found.roofs
    if flat and x >= memory.x2:
        return flat[0].y1
    return memory.y1 + (memory.y2 - memory.y1) * (x - memory.x1) / (memory.x2 - memory.x1)


def test_size_goes_with_time_and_numbers_come_last() -> None:
    found = charts.roofline(gpt2(after=False), ALL, {"before-13": 1})
    assert found is not None
    assert found.points[-1].label == "1"
    assert found.points[-1].row == "before-13"
    assert found.points[0].radius == max(point.radius for point in found.points) == 12.0
    areas = {point.row: (point.radius - 3.5) ** 2 for point in found.points}
    assert areas["before-13"] / areas["before-22"] == pytest.approx(6.0 / 8.3)
    assert found.points[0].tip.splitlines() == [
        "addmm, transformer.h.*.mlp.c_proj",
        "pytorch_utils.py:116",
        "8.3 us at each of 12 places, floor 1.36 us (16%)",
        "bound by launch",
    ]


def test_only_ops_that_the_table_lists_have_points() -> None:
    found = charts.roofline(gpt2(), {"after-3"}, {})
    assert found is not None
    assert [point.row for point in found.points] == ["after-3"]
    bars = charts.timeline(gpt2(), {"after-3"})
    assert bars is not None
    assert [bar.row for bar in bars.bars] == ["after-3", "", "", "", ""]


def test_what_takes_time_without_bytes_or_arithmetic_is_counted() -> None:
    found = charts.roofline(predicted(), ALL, {})
    assert found is not None
    assert found.left_out == 4
    nothing = Profile("as it was", "cpu", False, (), 1.0)
    assert charts.roofline(Explanation("Empty", (), nothing), ALL, {}) is None


def test_the_timeline_has_every_kernel_in_its_place() -> None:
    explanation = gpt2()
    found = charts.timeline(explanation, ALL)
    assert found is not None
    last = explanation.timeline[-1]
    assert found.us == pytest.approx(last.start_us + last.us)
    assert [bar.x for bar in found.bars] == pytest.approx([100 * s.start_us / found.us for s in explanation.timeline])
    assert (found.busy, found.waits) == ("93%", False)
    assert found.bars[0].row == "after-3"
    assert found.bars[0].label == "linear"
    assert charts.timeline(predicted(), ALL) is None
    slow = charts.timeline(gpt2(after=False), ALL)
    assert slow is not None
    assert slow.waits, "mostly gaps"


def test_kernels_at_the_same_time_lie_in_lanes() -> None:
    spans = (Span("a", "x", 0, 5), Span("b", "y", 1, 2), Span("c", "z", 3, 9), Span("d", "x", 12, 1))
    found = charts.timeline(replace(gpt2(), timeline=spans), ALL)
    assert found is not None
    assert found.lanes == 2
    assert [(bar.label, bar.lane) for bar in found.bars] == [("a", 0), ("b", 1), ("c", 1), ("d", 0)]
    assert found.busy == "100%"


@pytest.mark.parametrize("igraph", [True, False])
def test_boxes_of_a_picture_do_not_touch(igraph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if igraph:
        pytest.importorskip("igraph", reason="the finer layout needs igraph")
    else:
        monkeypatch.setitem(sys.modules, "igraph", None)
    picture = gpt2().pictures[0]
    drawing = pictures.draw(picture, pictures.group_colours([picture]), {"tanh": "before-18"})
    boxes = [(n.x - n.width / 2, n.y - n.height / 2, n.x + n.width / 2, n.y + n.height / 2) for n in drawing.nodes]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert right <= drawing.width
        assert top >= 0
        assert bottom <= drawing.height
        assert not [b for b in boxes[:i] if b[0] < right and left < b[2] and b[1] < bottom and top < b[3]]
    assert len(drawing.curves) == len(picture.edges)
    [tanh] = [node for node in drawing.nodes if node.title == "tanh"]
    assert tanh.row == "before-18"
    assert tanh.group == "linear + activation"


def test_one_group_has_one_colour_before_and_after() -> None:
    before, after = gpt2().pictures
    colours = pictures.group_colours([before, after])
    assert colours == {"attention": 0, "add_layer_norm": 1, "linear + activation": 2, "add_layer_norm (next layer)": 3}


def test_edges_that_lead_nowhere_or_back_are_left_out() -> None:
    nodes = (("a", "x", ""), ("b", "y", ""))
    picture = GraphPicture("odd", nodes, (("a", "b"), ("a", "b"), ("b", "a"), ("a", "gone"), ("b", "b")))
    assert len(pictures.draw(picture, {}, {}).curves) == 1
