"""An Explanation's graphs as one SVG file, side by side: what computes is a box, parts of one fusion have one colour.

Its text depends on the model and on the rewrites alone, not on what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from xml.sax.saxutils import escape, quoteattr

from burnish.graph.layout import arrange, curve
from burnish.report import digest
from burnish.report.data import Explanation, GraphPicture, OpRow, Profile
from burnish.report.pictures import COLOURS, group_colours

_INK, _QUIET, _PAPER = "#1f2933", "#66727f", "#ffffff"
_INPUT, _ALONE, _LINE = "#e3f1e5", "#eef0f2", "#9aa5b1"
_GROUPS = ("#f2a541", "#4ea8de", "#8bc34a", "#e56b6f", "#b388eb", "#2ec4b6", "#d4a373", "#ff8fab")
_FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_HEADING, _TITLE, _DETAIL = 15.0, 13.0, 10.5  # font sizes, px
_LETTER = 0.6  # width of a letter in font sizes
_TOP, _GAP = 56.0, 32.0
assert len(_GROUPS) == COLOURS


@dataclass
class _Box:
    """An input (op is ""), an op that computes, or a view, which is smaller."""

    op: str
    title: str
    detail: str
    is_view: bool
    fill: str
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        font = _DETAIL if self.is_view else _TITLE
        return max(54.0, len(self.title) * font * _LETTER + 20, len(self.detail) * _DETAIL * _LETTER + 20)

    @property
    def height(self) -> float:
        return 20.0 if self.is_view else 42.0 if self.detail else 28.0


def render(explanation: Explanation) -> str:
    """The pictures of the costliest block, the first of the model as it was. What is only planned is not counted, as
    nothing has told yet which ops compute. Without igraph (the extra `draw`) lines may cross."""
    colours = group_colours(explanation.pictures)
    panels, left, height = [], 0.0, 0.0
    for place, picture in enumerate(explanation.pictures):
        profile = explanation.after if place else explanation.before
        boxes = _boxes(picture, profile or explanation.before, colours)
        counted = _counted(boxes) if profile else ""
        panel, panel_width, panel_height = _panel(picture, boxes, counted, left)
        panels.append(panel)
        left, height = left + panel_width + _GAP, max(height, panel_height)
    width = max(left - _GAP, 0.0)
    label = quoteattr("; ".join(picture.title for picture in explanation.pictures))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" fill="{_INK}" role="img" aria-label={label}>',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0.5 L8,4 L0,7.5 z" fill="{_QUIET}"/></marker></defs>',
        f'<rect width="100%" height="100%" rx="8" fill="{_PAPER}"/>',
        *panels,
        "</svg>\n",
    ]
    return "\n".join(lines)


def _panel(picture: GraphPicture, boxes: Sequence[_Box], counted: str, left: float) -> tuple[str, float, float]:
    """One picture, its left edge at `left`, as SVG; its width and height."""
    place = {name: number for number, (name, _, _) in enumerate(picture.nodes)}
    edges = [(place[source], place[user]) for source, user in picture.edges if source in place and user in place]
    # The layout wants edges in order of computation, and none that leads back.
    edges = sorted((source, user) for source, user in dict.fromkeys(edges) if source < user)
    routes = arrange(boxes, edges, rough=find_spec("igraph") is None)
    sides = [box.x + box.width / 2 for box in boxes] + [x for route in routes for x, _ in route]
    width = max(max(sides, default=0.0), len(picture.title) * _HEADING * _LETTER, len(counted) * 7.0) + 24
    height = max((box.y + box.height / 2 for box in boxes), default=0.0) + _TOP
    return (
        "\n".join(
            [
                f'<g transform="translate({left:.0f} 0)">',
                f'<text x="24" y="32" font-size="{_HEADING}" font-weight="600">{escape(picture.title)}</text>',
                f'<text x="24" y="50" font-size="11.5" fill="{_QUIET}">{escape(counted)}</text>',
                f'<g transform="translate(0 {_TOP - 24:.0f})">',
                f'<g fill="none" stroke="{_QUIET}" stroke-width="1.2" stroke-opacity="0.75">',
                *(f'<path d="{curve(route)}" marker-end="url(#arrow)"/>' for route in routes),
                '</g>\n<g text-anchor="middle">',
                *map(_svg_box, boxes),
                "</g></g></g>",
            ]
        ),
        width,
        height,
    )


def _boxes(picture: GraphPicture, profile: Profile, colours: Mapping[str, int]) -> list[_Box]:
    rows: dict[str, OpRow] = {}
    for _, row in profile.rows:
        rows.setdefault(row.name, row)
    boxes = []
    for name, op, group in picture.nodes:
        found = rows.get(name)
        is_view = bool(op) and found is not None and not found.kernels
        alone = _PAPER if is_view else _ALONE if op else _INPUT
        fill = _GROUPS[colours[group]] if group else alone
        title = digest.op_name(op) or name
        boxes.append(_Box(op, title, found.module if found and not is_view else "", is_view, fill))
    return boxes


def _counted(boxes: Sequence[_Box]) -> str:
    """ "8 ops compute, 2 are views"."""
    views = sum(box.is_view for box in boxes)
    ops = sum(bool(box.op) for box in boxes) - views
    said = f"{ops} op{'s compute' if ops != 1 else ' computes'}"
    return said + (f", {views} {'are views' if views != 1 else 'is a view'}" if views else "")


def _svg_box(box: _Box) -> str:
    left, top, title = box.x - box.width / 2, box.y - box.height / 2, escape(box.title)
    place = f'x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    if box.is_view:
        return (
            f'<rect {place} rx="10" fill="{box.fill}" fill-opacity="0.25" stroke="{_LINE}" stroke-dasharray="3 2"/>'
            f'<text x="{box.x:.1f}" y="{box.y + 3.5:.1f}" font-size="{_DETAIL}" fill="{_QUIET}">{title}</text>'
        )
    stroke = _INK if box.fill in _GROUPS else _LINE
    parts = [
        f'<rect {place} rx="{6 if box.op else 14}" fill="{box.fill}" stroke="{stroke}"/>',
        f'<text x="{box.x:.1f}" y="{top + 18:.1f}" font-size="{_TITLE}" font-weight="600">{title}</text>',
    ]
    if box.detail:
        at = f'x="{box.x:.1f}" y="{top + 33:.1f}" font-size="{_DETAIL}"'
        parts.append(f'<text {at} fill-opacity="0.8">{escape(box.detail)}</text>')
    return "".join(parts)
