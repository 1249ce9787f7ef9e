"""`fuse`: the nodes of a match as one submodule, which a compiler makes fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.graph import Match
from burnish.graph.effects import input_nodes
from burnish.scheduling.locate import Site
from burnish.scheduling.primitives.matched import sites_of
from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.primitives.replace import Plan
from burnish.scheduling.rewriting import check_name, current, drop_uncalled, free_name, insert_call, leaves_of
from burnish.scheduling.tracing import TracedModule, calls_more_than_forward, finish

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


def _burnish(body: nn.Module) -> Callable[..., Any]:
    from burnish.optimizing import optimize

    return optimize(body)


COMPILERS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "burnish": _burnish,
    "inductor": torch.compile,
    "none": lambda body: body,
}


class Fused(nn.Module):
    """Some steps of a module (`body`), compiled at the first call."""

    def __init__(self, body: fx.GraphModule, compiler: str) -> None:
        super().__init__()
        self.body = body
        self.compiler = compiler
        self.training = body.training
        self.__dict__["_compiled"] = None

    def forward(self, *args: Any) -> Any:
        traced = any(isinstance(value, fx.Proxy) for value in pytree.tree_leaves(args))
        watched = calls_more_than_forward(self.body)
        if traced or watched or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.body(*args)
        if self.__dict__["_compiled"] is None:
            self.__dict__["_compiled"] = COMPILERS[self.compiler](self.body)
        return self.__dict__["_compiled"](*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # a copy compiles its own body

    def extra_repr(self) -> str:
        return f"compiler={self.compiler!r}"


@register
@dataclass(frozen=True)
class Fuse(Primitive):
    """Makes the nodes of each match one submodule, and lets a compiler make that fast at its first call.

    "burnish" runs `burnish.optimize` on it, "inductor" `torch.compile`; "none" only groups the nodes. Modules and
    weights that only the match uses move into the submodule; the built model's `state_dict` keeps their names.
    """

    verb: ClassVar[str] = "fuse"
    match: Any
    compiler: str = "burnish"
    name: str | None = None

    def check(self, schedule: Schedule) -> Plan:
        if self.compiler not in COMPILERS:
            raise ValueError(f"fuse: compiler={self.compiler!r}: use {', '.join(map(repr, COMPILERS))}")
        check_name(self.name, self.verb)
        sites = sites_of(schedule, self.match, self.verb)
        for site in sites:
            self._rewrite(site)
        return Plan([(site.owner, site.gm) for site in sites], sum(len(site.matches) for site in sites))

    def apply(self, schedule: Schedule, plan: Plan) -> int:
        for old, new in plan.changes:
            schedule.tree.put(old, new)
        return plan.count

    def _rewrite(self, site: Site) -> None:
        done: dict[fx.Node, fx.Node] = {}
        paths = list(leaves_of(site, site.matches))
        for match in site.matches:
            name = free_name(site.gm, self.name, "Fused")
            body, inputs = _body(site, match, name, done)
            site.gm.add_module(name, Fused(body, self.compiler))
            insert_call(site, name, (tuple(inputs), {}), [match], done)
        drop_uncalled(site, paths)
        _drop_unread(site)
        finish(site.gm)


def _body(site: Site, match: Match, name: str, done: Mapping[fx.Node, fx.Node]) -> tuple[TracedModule, list[fx.Node]]:
    """The match as a module of its own, and the nodes that are its inputs: first those that the pattern names."""
    inside = set(match.nodes)
    graph = fx.Graph()
    image: dict[fx.Node, fx.Node] = {}
    names = {current(n, done): key for key, n in reversed(match.bindings.items()) if isinstance(n, fx.Node)}
    inputs: list[fx.Node] = []
    needed = dict.fromkeys(n for node in match.nodes for n in input_nodes((node.args, node.kwargs)))
    sources = [*(n for n in reversed(names) if n in needed), *(n for n in needed if n not in names)]
    read = [node for node in sources if node.op == "get_attr" and not set(node.users) - inside]
    for node in sources:
        if node not in inside and node not in read:
            image[node] = graph.placeholder(names.get(node, node.name))
            inputs.append(node)
    for node in (*read, *match.nodes):
        image[node] = graph.node_copy(node, image.__getitem__)
    results = tuple(image[node] for node in match.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    body = TracedModule(site.gm, graph, class_name=name)
    for node in graph.nodes:
        if node.op == "get_attr":
            parent, _, attribute = str(node.target).rpartition(".")
            if attribute in site.gm.get_submodule(parent)._non_persistent_buffers_set:
                body.get_submodule(parent)._non_persistent_buffers_set.add(attribute)
    body.training = site.owner.training
    finish(body)
    return body, inputs


def _drop_unread(site: Site) -> None:
    """Weights that moved into a submodule are no longer the module's own."""
    moved = {
        id(tensor)
        for module in site.gm.modules()
        if isinstance(module, Fused)
        for part in module.body.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    }
    used = {str(node.target) for node in site.gm.graph.nodes if node.op == "get_attr"}
    originals = {id(module) for module in site.owner.modules()}
    for path, module in list(site.gm.named_modules()):
        if module is not site.gm and id(module) in originals:
            continue  # somebody else's: only copies that were made for this graph are changed
        for table in (module._parameters, module._buffers):
            for key, tensor in list(table.items()):
                name = f"{path}.{key}" if path else key
                if isinstance(tensor, Tensor) and id(tensor) in moved and name not in used and _inlined(path, site):
                    table[key] = None


def _inlined(path: str, site: Site) -> bool:
    """Whether a module is part of the graph, and not a submodule that it calls."""
    called = [str(node.target) for node in site.gm.graph.nodes if node.op == "call_module"]
    return not any(path == target or path.startswith(f"{target}.") for target in called)


__all__ = ["COMPILERS", "Fuse", "Fused"]
