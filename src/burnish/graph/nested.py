"""Find a pattern anywhere in a module's tree, whether or not the whole module can be traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from burnish.graph.matcher import Guard, Match, PatternLike, find_matches
from burnish.graph.prepare import Pattern

__all__ = ["Found", "find_in_module"]

_PARENT = "parent_module"  # meta key: path of the module whose forward made the call


class Found(list[tuple[str, fx.Node]]):
    """One occurrence: for each of its nodes, in graph order, the path of the module that makes the call, and the node.

    match: the Match; root: the path of the module that was traced; graph_module: its graph, in which the nodes live
    """

    def __init__(self, match: Match, root: str, graph_module: fx.GraphModule) -> None:
        super().__init__((_join(root, node.meta[_PARENT]), node) for node in match.nodes)
        self.match = match
        self.root = root
        self.graph_module = graph_module


def find_in_module(root: nn.Module, pattern: PatternLike, *, guard: Guard | None = None) -> list[Found]:
    """Every occurrence of a pattern in `root`, however deep, in order of computation; `root` is not changed.

    `root` is traced symbolically, its submodules (but those of `torch.nn`) inlined, so that a pattern matches the same
    in a child as at the root. What cannot be traced is left whole there, and its children are searched on their own.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"root must be a module, got {type(root).__name__}")
    return list(_search(root, "", Pattern.of(pattern), guard, set()))


def _search(root: nn.Module, path: str, pattern: Pattern, guard: Guard | None, seen: set[int]) -> Iterator[Found]:
    if id(root) in seen:  # a module that is used in two places is searched once
        return
    seen.add(id(root))
    opaque: set[int] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(root)
            break
        except Exception:  # forward code may fail on proxies in any way; the innermost module at fault is left whole
            culprit = tracer.stack[-1] if tracer.stack else root
            opaque.add(id(culprit))
            if culprit is root:
                for name, child in root.named_children():
                    yield from _search(child, _join(path, name), pattern, guard, seen)
                return
    gm = fx.GraphModule(tracer.root, graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    parts: list[tuple[int, Any]] = [(position[m.anchor], m) for m in find_matches(gm, pattern, guard=guard)]
    parts += [
        (position[n], n) for n in graph.nodes if n.op == "call_module" and id(gm.get_submodule(str(n.target))) in opaque
    ]
    for _, part in sorted(parts, key=lambda item: item[0]):
        if isinstance(part, Match):
            yield Found(part, path, gm)
            continue
        target = str(part.target)
        for name, child in gm.get_submodule(target).named_children():
            yield from _search(child, _join(path, f"{target}.{name}"), pattern, guard, seen)


class _Tracer(fx.Tracer):
    """Inlines what can be traced, and notes on every node whose forward it came from."""

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self.opaque = opaque
        self.stack: list[nn.Module] = []
        self.paths: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.stack.append(m)
        self.paths.append(path)
        result = super().call_module(m, forward, args, kwargs)  # on an error the stack shows where it happened
        self.stack.pop()
        self.paths.pop()
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[_PARENT] = self.paths[-1]
        return node


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name
