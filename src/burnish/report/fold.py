"""Repeated layers folded into one block: which block a node belongs to, and which of its repeats.

Layers are alike where they have numbers for names (`encoder.layer.3`) and the same calls in the same order, in the same
submodules, on the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from burnish.report.where import modules_of, path_of

_FEWEST_CALLS = 3  # a layer has more than a product and its view


@dataclass(frozen=True)
class Place:
    """block: position among the folding's blocks. repeat: which of the folded layers. module: the path seen from
    there."""

    block: int
    repeat: int
    module: str


@dataclass(frozen=True)
class Folded:
    """A block without its rows: see `burnish.report.data.Block`. paths: of the folded submodules, in order."""

    path: str
    kind: str
    paths: tuple[str, ...]


class Folding:
    """The blocks of a graph.

    A block is a group of layers that are alike, or a layer like no other, or else a submodule that stands beside layers
    and holds none. A model without layers is one block.

    Args:
        nodes: those that have a row, in the order of execution.
        alike: what two nodes must have in common to fold, besides their submodule; None for one that does not count,
            such as a view, which capture puts into the first layer only where all layers use it.
    """

    def __init__(self, nodes: Sequence[fx.Node], alike: Callable[[fx.Node], Hashable]) -> None:
        self._kinds = {path: kind for node in nodes for path, kind in modules_of(node)}
        self._kinds.setdefault("", "model")
        paths = {node: path_of(node) for node in nodes}
        self._group_of: dict[str, str] = {}  # a layer's path -> its group's
        self._groups: dict[str, tuple[str, ...]] = {}
        self._alike = alike
        self._find_groups("", paths)
        self._find_others("", paths)
        self._open = {""} | {prefix for path in self._group_of for prefix in _prefixes(path)[:-1]}
        if not self._group_of:
            self._open.clear()
        self.blocks: list[Folded] = []
        self._block: dict[str, int] = {}
        for path in paths.values():
            self.place(path)

    def place(self, path: str) -> Place:
        """Where a node in the module `path` belongs. A block that is new is added at the end."""
        for prefix in _prefixes(path):
            if prefix in self._group_of:
                group = self._group_of[prefix]
                layers = self._groups[group]
                return Place(self._number(group, layers), layers.index(prefix), _below(path, prefix))
        own = next((prefix for prefix in ("", *_prefixes(path)) if prefix not in self._open), path)
        return Place(self._number(own, (own,)), 0, _below(path, own))

    def _number(self, path: str, layers: tuple[str, ...]) -> int:
        if path not in self._block:
            self._block[path] = len(self.blocks)
            self.blocks.append(Folded(path, self._kinds.get(layers[0], ""), layers))
        return self._block[path]

    def _find_groups(self, parent: str, paths: Mapping[fx.Node, str]) -> None:
        """The layers that are alike among the children of `parent`, or else among theirs."""
        children = _children(parent, paths)
        numbered = [child for child in children if _is_numbered(child)]
        by_structure: dict[Hashable, list[str]] = {}
        for child in numbered:
            if structure := self._structure(child, children[child]):
                by_structure.setdefault(structure, []).append(child)
        for layers in by_structure.values():
            if len(layers) > 1:
                name = _join(parent, "*" if len(layers) == len(numbered) else _numbers(layers))
                self._add_group(name, layers)
        for child, nodes in children.items():
            if child not in self._group_of:
                self._find_groups(child, nodes)

    def _find_others(self, parent: str, paths: Mapping[fx.Node, str]) -> None:
        """The layers that are like no other, the outermost ones that hold no groups."""
        for child, nodes in _children(parent, paths).items():
            holds_groups = any(layer.startswith(f"{child}.") for layer in self._group_of)
            if _is_numbered(child) and not holds_groups and self._structure(child, nodes):
                if child not in self._group_of:
                    self._add_group(child, [child])
            elif child not in self._group_of:
                self._find_others(child, nodes)

    def _structure(self, layer: str, nodes: Mapping[fx.Node, str]) -> Hashable:
        """What layers have in common that are alike; None for what is too small to be a layer."""
        keys = ((_below(path, layer), self._alike(node)) for node, path in nodes.items())
        structure = tuple(key for key in keys if key[1] is not None)
        return structure if len(structure) >= _FEWEST_CALLS else None

    def _add_group(self, name: str, layers: Sequence[str]) -> None:
        self._groups[name] = tuple(layers)
        self._group_of.update(dict.fromkeys(layers, name))


def _children(parent: str, paths: Mapping[fx.Node, str]) -> dict[str, dict[fx.Node, str]]:
    """The nodes in submodules of `parent`, by the child that they are in."""
    children: dict[str, dict[fx.Node, str]] = {}
    for node, path in paths.items():
        if below := _below(path, parent):
            children.setdefault(_join(parent, below.partition(".")[0]), {})[node] = path
    return children


def _is_numbered(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _prefixes(path: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b", "a.b.c"]."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _below(path: str, parent: str) -> str:
    """`path` seen from `parent`, of which it is a submodule's; "" for its own."""
    return path.removeprefix(parent).removeprefix(".")


def _numbers(layers: Iterable[str]) -> str:
    """Runs of numbers: "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(int(layer.rpartition(".")[2]) for layer in layers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
