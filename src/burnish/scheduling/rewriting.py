"""Calls in the place of matches, in a graph that nobody else has."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from burnish.graph import Match, erase
from burnish.graph.effects import input_nodes, mutated_args, nodes_between
from burnish.graph.trace import signature_of
from burnish.graph.values import same_value
from burnish.scheduling.clone import shallow_copy
from burnish.scheduling.find import has_no_forward
from burnish.scheduling.locate import Site

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def inputs_of(match: Match) -> Arguments:
    """The arguments of a match: by the pattern's names, or where there is no pattern those of the one node."""
    if match.pattern is None:
        (node,) = match.nodes
        return node.args, dict(node.kwargs)
    return (), {name: match.bindings[name] for name in match.pattern.parameters}


def same_inputs(matches: Sequence[Match]) -> bool:
    """Whether there are several matches, and all have the same arguments."""
    first, *others = (inputs_of(match) for match in matches)
    return bool(others) and all(same_value(list(first[0]), list(o[0])) and _same(first[1], o[1]) for o in others)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(same_value(a[name], b[name]) for name in a)


def arguments_for(new: Callable[..., Any], match: Match) -> Arguments:
    """The match's arguments for a call of `new`: by name where `new` has the pattern's names, else in order.

    ValueError where they do not fit.
    """
    args, kwargs = inputs_of(match)
    signature = signature_for(new)
    if signature is None:
        return (*args, *kwargs.values()), {}
    if match.pattern is not None:
        named = {name: kwargs[name] for name in signature.parameters if name in kwargs}
        required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in _NAMED]
        if named and all(name in named for name in required):
            return (), named
        args, kwargs = tuple(kwargs.values()), {}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join(match.pattern.parameters) if match.pattern else f"{len(args) + len(kwargs)} arguments"
        raise ValueError(f"match: its inputs ({given}) do not fit {name_of(new)}{signature}: {error}") from None
    return args, kwargs


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def signature_for(new: Callable[..., Any]) -> inspect.Signature | None:
    """What a caller must give; None where Python does not know (functions written in C)."""
    try:
        return signature_of(new)
    except (ValueError, TypeError):
        return None


def name_of(new: Any) -> str:
    return getattr(new, "__name__", type(new).__name__)


def insert_call(
    site: Site,
    target: str | Callable[..., Any],
    arguments: Arguments,
    matches: Sequence[Match],
    done: dict[fx.Node, fx.Node],
) -> fx.Node:
    """One call, of a submodule by name or of a function, in the place of `matches`: it returns all of their results, in
    order, as a tuple where there are several.

    Args:
        done: nodes of the graph that were replaced before, and by what; what is replaced now is added.
    """
    graph, gm = site.gm.graph, site.gm
    outputs = [node for match in matches for node in match.outputs]
    inside = {node for match in matches for node in match.nodes}
    call: Any = map_arg(arguments, lambda node: current(node, done))
    position = {node: i for i, node in enumerate(graph.nodes)}
    ordered = sorted(inside, key=position.__getitem__)
    latest = max(input_nodes(call), key=position.__getitem__, default=ordered[0])
    if inside & set(input_nodes(call)):
        raise ValueError("match: one of the matches needs another one's result")
    start = latest if position[latest] >= position[ordered[0]] else ordered[0]
    # What is changed in place inside of one match, `find_matches` has looked at; not so between several.
    for node in nodes_between(ordered[0], ordered[-1]) if len(matches) > 1 else ():
        if node not in inside and mutated_args(node, gm):
            raise ValueError(f"match: {node.name}, between the matches, changes a value in place")
    with graph.inserting_after(start) if start is latest else graph.inserting_before(start):
        new = graph.create_node("call_module" if isinstance(target, str) else "call_function", target, *call)
    new.meta.update({key: value for key, value in outputs[0].meta.items() if key == "parent_module"})
    results = [new]
    if len(outputs) > 1:
        with graph.inserting_before(new.next):
            results = [graph.call_function(operator.getitem, (new, i)) for i in range(len(outputs))]
    for old, result in zip(outputs, results, strict=True):
        old.replace_all_uses_with(result)
        done[old] = result
    erase(gm, reversed(ordered))
    try:
        graph.lint()
    except RuntimeError as error:
        raise ValueError(f"match: its call cannot be put into an order with the rest: {error}") from error
    return new


def current(node: fx.Node, done: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node, or what has taken its place."""
    while node in done:
        node = done[node]
    return node


# --- submodules -------------------------------------------------------------------------------------------------------


def leaves_of(site: Site, matches: Sequence[Match]) -> dict[str, nn.Module]:
    """The submodules that the matches call, each once, in order, by path."""
    paths = [str(node.target) for match in matches for node in match.nodes if node.op == "call_module"]
    found: dict[str, nn.Module] = {}
    for path in paths:
        module = site.gm.get_submodule(path)
        if all(module is not other for other in found.values()):
            found[path] = module
    return found


def free_name(module: nn.Module, wanted: str | None, default: str) -> str:
    """A name that `module` has no attribute of: the one wanted, or the first of it with a number."""
    name = wanted or f"{default}_0"
    stem, number = wanted or default, 0
    while hasattr(module, name):
        number += 1
        name = f"{stem}_{number}"
    return name


def check_name(name: str | None, primitive: str) -> None:
    """ValueError where a submodule cannot be called so."""
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"{primitive}: name must be a Python name without dots, got {name!r}")


def drop_uncalled(site: Site, paths: Sequence[str]) -> list[nn.Module]:
    """Removes the submodules that the graph no longer calls. Returns them."""
    gm = site.gm
    called = {id(gm.get_submodule(str(n.target))) for n in gm.graph.nodes if n.op == "call_module"}
    originals = {id(module) for module in site.owner.modules()}
    dropped = []
    for path in paths:
        parts = path.split(".")
        parent: nn.Module = gm
        for part in parts[:-1]:
            child = parent._modules[part]
            assert child is not None
            if id(child) in originals:
                if not has_no_forward(child):  # it may call the submodule somewhere else
                    break
                child = parent._modules[part] = shallow_copy(child)
            parent = child
        else:
            module = parent._modules[parts[-1]]
            if module is not None and id(module) not in called:
                dropped.append(module)
                del parent._modules[parts[-1]]
    return dropped
