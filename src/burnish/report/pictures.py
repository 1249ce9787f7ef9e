"""A `GraphPicture` laid out for the page: boxes and curves in pixels, parts of one fusion in one colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from burnish.graph.layout import arrange, curve
from burnish.report import digest
from burnish.report.data import GraphPicture

COLOURS = 8
_TITLE, _DETAIL = 7.6, 6.4  # pixels a character, at the page's 13 and 11 px


@dataclass
class Node:
    """A box. colour: the number of its fusion's colour, None for a part of none. row: the id of its op's row, or ""."""

    title: str
    detail: str
    group: str
    colour: int | None
    row: str
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return max(64.0, len(self.title) * _TITLE + 24, len(self.detail) * _DETAIL + 24)

    @property
    def height(self) -> float:
        return 40.0 if self.detail else 28.0

    @property
    def tip(self) -> str:
        return "\n".join(line for line in (self.title, self.detail, self.group) if line)


@dataclass(frozen=True)
class Drawing:
    """A laid out picture: its boxes, its lines and its size."""

    title: str
    nodes: tuple[Node, ...]
    curves: tuple[str, ...]
    width: float
    height: float


def group_colours(pictures: Iterable[GraphPicture]) -> dict[str, int]:
    """A colour for each group, the same before and after; they come again where there are more than `COLOURS`."""
    groups = dict.fromkeys(group for picture in pictures for _, _, group in picture.nodes if group)
    return {group: number % COLOURS for number, group in enumerate(groups)}


def draw(picture: GraphPicture, colours: Mapping[str, int], rows: Mapping[str, str]) -> Drawing:
    """rows: node name -> id of its row on the page. An edge to a node that is not in the picture is left out."""
    nodes = []
    for name, op, group in picture.nodes:
        title = digest.op_name(op) or name
        detail = _short(name) if name != title else ""
        nodes.append(Node(_short(title), detail, group, colours.get(group), rows.get(name, "")))
    place = {name: number for number, (name, _, _) in enumerate(picture.nodes)}
    edges = [(place[source], place[user]) for source, user in picture.edges if source in place and user in place]
    # The layout wants edges in order of computation, and none that leads back.
    edges = sorted((source, user) for source, user in dict.fromkeys(edges) if source < user)
    routes = arrange(nodes, edges, rough=find_spec("igraph") is None)
    width = max([node.x + node.width / 2 for node in nodes] + [x for route in routes for x, _ in route], default=0.0)
    height = max((node.y + node.height / 2 for node in nodes), default=0.0)
    return Drawing(picture.title, tuple(nodes), tuple(map(curve, routes)), width + 24, height + 24)


def _short(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{text[-limit // 2 :]}"
