"""A graph as a picture: layers from inputs (top) to outputs (bottom), matches in colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import fx
from torch.fx.node import map_aggregate

from burnish.graph.layout import Point, arrange, curve
from burnish.graph.matcher import Match
from burnish.graph.normalize import canonical, describe_key, is_symbolic_value

_INK, _QUIET, _PAPER, _LINE = "#1f2933", "#66727f", "#ffffff", "#9aa5b1"
_FILLS = {"placeholder": "#e3f1e5", "output": "#e3f1e5", "call_module": "#ece7f7", "get_attr": "#eef0f2"}
_PLAIN_FILL = "#f4f6f8"
_MATCH_COLOURS = ("#f2a541", "#4ea8de", "#8bc34a", "#e56b6f", "#b388eb", "#2ec4b6", "#d4a373", "#ff8fab")
_FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_TITLE, _DETAIL = 13.0, 10.5  # font sizes, px
_LEGEND_ROWS = 10
_UNTOLD = ("pin_memory", "cudnn_enable", "non_blocking")


@dataclass
class _Box:
    """A node as it is drawn: a title, smaller lines under it, and in the end a place."""

    node: fx.Node
    title: str
    details: list[str]
    fill: str
    stroke: str
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        widths = [len(self.title) * _TITLE * 0.6, *(len(line) * _DETAIL * 0.56 for line in self.details)]
        return max(70.0, max(widths) + 22)

    @property
    def height(self) -> float:
        return 26.0 + 14.0 * len(self.details)


def draw(gm: fx.GraphModule, path: str | Path, highlight: Iterable[Match] = ()) -> Path:
    """Draw the graph to an SVG file and return its path.

    Weights and symbolic sizes are written inside the boxes that use them. Nodes of the matches in `highlight` are
    coloured, one colour for each. The layout is igraph's (the extra `draw`); where igraph is missing, a Graphviz file
    with the suffix `.dot` is written instead, and its path returned.

    Raises ValueError for a match of another graph, or one whose nodes have been replaced.
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"gm must be a torch.fx.GraphModule (see burnish.graph.trace), got {type(gm).__name__}")
    path = Path(path)
    matches = list(highlight)
    colours = _colours(gm, matches)
    boxes = [_box(gm, node, colours.get(node)) for node in gm.graph.nodes if not _is_folded(node)]
    place = {box.node: i for i, box in enumerate(boxes)}
    edges = [(place[s], i) for i, box in enumerate(boxes) for s in box.node.all_input_nodes if s in place]
    try:
        routes = arrange(boxes, edges)
    except ImportError:
        path = path.with_suffix(".dot")
        path.write_text(_dot(boxes, edges), encoding="utf-8")
        return path
    path.write_text(_svg(boxes, routes, matches), encoding="utf-8")
    return path


def _colours(gm: fx.GraphModule, matches: Sequence[Match]) -> dict[fx.Node, str]:
    known = set(gm.graph.nodes)
    colours: dict[fx.Node, str] = {}
    for i, match in enumerate(matches):
        for node in match.nodes:
            if node not in known:
                raise ValueError(
                    f"highlight: {node.name} of the match at {match.anchor.name} is not in this graph; draw before "
                    "replacing"
                )
            colours.setdefault(node, _MATCH_COLOURS[i % len(_MATCH_COLOURS)])
    return colours


# --- what is written in a box -----------------------------------------------------------------------------------------


def _is_folded(node: fx.Node) -> bool:
    """Weights and sizes: an edge for each would hide the rest."""
    if node.op == "get_attr":
        return all(user.op != "output" for user in node.users)
    return node.op == "call_function" and is_symbolic_value(node)


def _box(gm: fx.GraphModule, node: fx.Node, colour: str | None) -> _Box:
    title, details = node.name, []
    if node.op == "call_module":
        title = type(gm.get_submodule(str(node.target))).__name__
        details.append(str(node.target))
    elif node.op.startswith("call"):
        title = describe_key(canonical(node, gm).key)
        if node.name.rstrip("0123456789_") != title.rpartition("::")[2].rstrip("_"):
            details.append(node.name)
    if constants := _constants(node):
        details.append(constants)
    weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    details += [_short(w) for w in weights]
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        sizes = " x ".join(map(str, value.shape)) or "scalar"
        details.append(f"{sizes}  {str(value.dtype).removeprefix('torch.')}")
    fill = colour or _FILLS.get(node.op, _PLAIN_FILL)
    return _Box(node, _short(title), details, fill, _INK if colour else _LINE)


def _constants(node: fx.Node) -> str:
    if node.op == "output":
        return ""
    names = iter(_argument_names(node))
    args = [(next(names, ""), a) for a in node.args] + list(node.kwargs.items())
    told = [(k, a) for k, a in args if a is not None and k not in _UNTOLD and not _has_tensor(a)]
    shown = [f"{k}={_constant(a)}" if k else _constant(a) for k, a in told]
    return _short(", ".join(shown), 44)


def _argument_names(node: fx.Node) -> list[str]:
    """Names for an operator's positional arguments, "" for those that everybody knows by place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    known = ("other", "size", "shape", "dims", "dim0", "dim1", "exponent", "normalized_shape", "dtype")
    return ["" if a.name in known else a.name for a in node.target._schema.arguments]


def _has_tensor(arg: Any) -> bool:
    found: list[Any] = []
    map_aggregate(arg, found.append)
    return any(isinstance(a, fx.Node) and not is_symbolic_value(a) for a in found)


def _constant(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return str(arg.meta["val"])
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_constant, arg))}]"
    if isinstance(arg, float):
        return f"{arg:.6g}"
    return str(arg).removeprefix("torch.").replace(str(2**63 - 1), "end")


def _short(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{text[-limit // 2 :]}"


# --- writing ----------------------------------------------------------------------------------------------------------


def _svg(boxes: Sequence[_Box], routes: Sequence[Sequence[Point]], matches: Sequence[Match]) -> str:
    legend = _legend(matches)
    right = max([b.x + b.width / 2 for b in boxes] + [x for route in routes for x, _ in route], default=0.0) + 24
    bottom = max([b.y + b.height / 2 for b in boxes], default=0.0) + 24
    legend_width = max((len(label) for _, label in legend), default=0) * _DETAIL * 0.58 + 50 if legend else 0
    width, height = right + legend_width, max(bottom, 40 + 20 * len(legend))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" fill="{_INK}">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0.5 L8,4 L0,7.5 z" fill="{_QUIET}"/></marker></defs>',
        f'<rect width="100%" height="100%" fill="{_PAPER}"/>',
        f'<g fill="none" stroke="{_QUIET}" stroke-width="1.2" stroke-opacity="0.75">',
    ]
    lines += [f'<path d="{curve(route)}" marker-end="url(#arrow)"/>' for route in routes]
    lines.append('</g>\n<g text-anchor="middle">')
    lines += [_svg_box(box) for box in boxes]
    lines.append("</g>")
    for i, (colour, label) in enumerate(legend):
        y = 30 + 20 * i
        swatch = f'<rect x="{right:.1f}" y="{y}" width="13" height="13" rx="3" fill="{colour}" stroke="{_INK}"/>'
        text = f'<text x="{right + 20:.1f}" y="{y + 11}" font-size="{_DETAIL + 1}">{escape(label)}</text>'
        lines.append((swatch if colour else "") + text)
    lines.append("</svg>\n")
    return "\n".join(lines)


def _legend(matches: Sequence[Match]) -> list[tuple[str, str]]:
    rows = []
    for i, match in enumerate(matches[:_LEGEND_ROWS]):
        name = match.pattern.name if match.pattern else "match"
        nodes = f"{len(match.nodes)} node{'s' if len(match.nodes) != 1 else ''}"
        rows.append((_MATCH_COLOURS[i % len(_MATCH_COLOURS)], f"{name} at {match.anchor.name} ({nodes})"))
    if len(matches) > _LEGEND_ROWS:
        rows.append(("", f"and {len(matches) - _LEGEND_ROWS} more"))
    return rows


def _svg_box(box: _Box) -> str:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    tooltip = escape(f"{box.node.name}: {box.node.format_node() or box.node.op}")
    parts = [
        f"<g><title>{tooltip}</title>",
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6" '
        f'fill="{box.fill}" stroke="{box.stroke}"/>',
        f'<text x="{box.x:.1f}" y="{top + 17:.1f}" font-size="{_TITLE}" font-weight="600">{escape(box.title)}</text>',
    ]
    for i, line in enumerate(box.details):
        y = top + 32 + 14 * i
        parts.append(
            f'<text x="{box.x:.1f}" y="{y:.1f}" font-size="{_DETAIL}" fill-opacity="0.8">{escape(line)}</text>'
        )
    return "".join(parts) + "</g>"


def _dot(boxes: Sequence[_Box], edges: Sequence[tuple[int, int]]) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = ["digraph {", '  node [shape=box, style="rounded,filled", fontname=Helvetica];']
    for i, box in enumerate(boxes):
        label = quoted("\n".join([box.title, *box.details])).replace("\n", "\\n")
        lines.append(f"  n{i} [label={label}, fillcolor={quoted(box.fill)}];")
    lines += [f"  n{source} -> n{target};" for source, target in edges]
    return "\n".join([*lines, "}", ""])
