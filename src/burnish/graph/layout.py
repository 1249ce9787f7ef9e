"""Where the boxes of a drawn graph go: layers from inputs (top) to outputs (bottom), and the lines between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

Point = tuple[float, float]


class Box(Protocol):
    """What is drawn for a node: a size in pixels, and its centre, which `arrange` sets."""

    x: float
    y: float

    @property
    def width(self) -> float: ...

    @property
    def height(self) -> float: ...


def arrange(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], *, rough: bool = False) -> list[list[Point]]:
    """Place the boxes; return for every edge the points it passes.

    edges: pairs of indices into `boxes`, in order of computation. The order within a layer, which keeps lines from
    crossing, is igraph's (the extra `draw`): ImportError where it is missing, unless `rough` asks for the order of
    computation instead.
    """
    layers = _layers(len(boxes), edges)
    # A long edge gets a place of its own in every layer that it crosses: it passes between boxes, not behind them.
    chains: list[list[int]] = []
    for source, target in edges:
        passed = range(len(layers), len(layers) + layers[target] - layers[source] - 1)
        layers += range(layers[source] + 1, layers[target])
        chains.append([source, *passed, target])
    steps = [step for chain in chains for step in itertools.pairwise(chain)]
    layout = [(0.0, float(layer)) for layer in layers] if rough else _sugiyama(layers, steps)
    rows = sorted({round(y) for _, y in layout})
    heights = {
        row: max((b.height for b, (_, y) in zip(boxes, layout, strict=False) if round(y) == row), default=0.0)
        for row in rows
    }
    tops: dict[int, float] = {}
    top = 30.0
    for row in rows:
        tops[row] = top
        top += heights[row] + 38
    centres = _columns(boxes, layout)
    points = [(centres[i], tops[round(y)] + heights[round(y)] / 2) for i, (_, y) in enumerate(layout)]
    for box, (x, y) in zip(boxes, points, strict=False):
        box.x, box.y = x, y
    routes = []
    for chain in chains:
        first, last = boxes[chain[0]], boxes[chain[-1]]
        route: list[Point] = [(first.x, first.y + first.height / 2)]
        for at in chain[1:-1]:
            x, y = points[at]
            half = heights[round(layout[at][1])] / 2
            route += [(x, y - half), (x, y + half)]
        route.append((last.x, last.y - last.height / 2))
        routes.append(route)
    return routes


def curve(route: Sequence[Point]) -> str:
    """The route as an SVG path: straight where it goes straight down, an S where it moves aside."""
    x, y = route[0]
    parts = [f"M{x:.1f},{y:.1f}"]
    for next_x, next_y in route[1:]:
        if abs(next_x - x) < 0.5:
            parts.append(f"L{next_x:.1f},{next_y:.1f}")
        else:
            middle = (y + next_y) / 2
            parts.append(f"C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}")
        x, y = next_x, next_y
    return " ".join(parts)


def _layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Every box below what it needs, and sources just above their first user."""
    layer = [0] * count
    for source, user in edges:  # edges come in order of computation, so sources are settled
        layer[user] = max(layer[user], layer[source] + 1)
    has_inputs = {user for _, user in edges}
    for box in range(count):
        users = [layer[user] for source, user in edges if source == box] if box not in has_inputs else []
        if users:
            layer[box] = min(users) - 1
    return layer


def _sugiyama(layers: Sequence[int], steps: Sequence[tuple[int, int]]) -> list[Point]:
    import igraph

    graph: Any = igraph.Graph(n=len(layers), edges=steps, directed=True)
    return [(x, y) for x, y in graph.layout_sugiyama(layers=layers, maxiter=100)][: len(layers)]


def _columns(boxes: Sequence[Box], layout: Sequence[Point]) -> list[float]:
    """Centres in pixels: the layout's order and rough places, moved apart where boxes of one row would touch."""
    gap, lane = 26.0, 10.0
    width = [box.width for box in boxes] + [lane] * (len(layout) - len(boxes))
    unit = sorted(width[: len(boxes)])[len(boxes) // 2] * 0.62 + gap if boxes else gap
    centre = [x * unit for x, _ in layout]
    rows: dict[int, list[int]] = {}
    for i, (_, y) in enumerate(layout):
        rows.setdefault(round(y), []).append(i)
    for members in rows.values():
        members.sort(key=lambda i: layout[i][0])
        placed = [centre[i] for i in members]
        for left, right in zip(range(len(members)), range(1, len(members)), strict=False):
            needed = (width[members[left]] + width[members[right]]) / 2 + gap
            placed[right] = max(placed[right], placed[left] + needed)
        # Keep the row where the layout wanted its middle, so that straight lines stay straight.
        shift = sum(centre[i] - p for i, p in zip(members, placed, strict=True)) / len(members)
        for i, p in zip(members, placed, strict=True):
            centre[i] = p + shift
    leftmost = min((c - w / 2 for c, w in zip(centre, width, strict=True)), default=0.0)
    return [c - leftmost + 24 for c in centre]
