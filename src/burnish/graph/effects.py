"""What a node does besides computing its value: mutation, randomness, aliasing."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from burnish.graph._words import words

_VIEWS = words(
    """
    alias contiguous chunk detach diagonal dropout expand expand_as feature_dropout flatten getitem movedim narrow
    permute reshape reshape_as select slice split squeeze swapaxes swapdims t to transpose type_as unbind unflatten
    unfold unsqueeze view view_as float half bfloat16 double
    """
)
_RANDOM = words(
    """
    alpha_dropout bernoulli dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout multinomial
    normal poisson rand rand_like randint randint_like randn randn_like randperm rrelu
    """
)
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in words(
        "setitem delitem iadd isub imul itruediv ifloordiv imod imatmul ipow iand ior ixor ilshift irshift"
    )
)


def input_nodes(arg: Any) -> list[fx.Node]:
    """All nodes inside an argument, nested in lists, dicts and slices, in order."""
    found: list[fx.Node] = []
    map_arg(arg, found.append)
    return found


def module_of(node: fx.Node, gm: fx.GraphModule) -> nn.Module | None:
    """The module that a `call_module` node calls, or None for other nodes."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def function_name(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls ("" for anything else)."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def mutated_args(node: fx.Node, gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values this node changes in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        if not node.target._schema.is_mutable:
            return []
        changed: list[Any] = []
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed.append(_argument(node, position, argument.name, None))
        return input_nodes(tuple(changed))
    name = function_name(node)
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= node.op == "call_function" and node.target in _INPLACE_OPERATORS
    in_place |= node.kwargs.get("inplace") is True
    if (module := module_of(node, gm)) is not None:
        in_place |= getattr(module, "inplace", False) is True
    changed = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    if in_place:
        changed.append(_argument(node, 0, "input", None))
    return input_nodes(tuple(changed))


def is_random(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the node draws from a random number generator."""
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return True
        name = function_name(node)
        if name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            return bool(_argument(node, 2, "train", True)) and _argument(node, 1, "p", 0.5) != 0
        if name == "scaled_dot_product_attention":
            return _argument(node, 4, "dropout_p", 0.0) != 0
        return name in _RANDOM
    if (module := module_of(node, gm)) is not None:
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p != 0 for m in module.modules())
    return function_name(node) in _RANDOM


def is_pure(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether removing or repeating the node changes nothing but its own value."""
    if node.op == "get_attr":
        return True
    if node.op in ("placeholder", "output") or node.is_impure():
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return bool(schema.returns) and not schema.is_mutable and not is_random(node, gm)
    return not mutated_args(node, gm) and not is_random(node, gm)


def alias_sources(node: fx.Node, gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs whose storage this node's value may share."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        sources: list[Any] = []
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None:
                sources.append(_argument(node, position, argument.name, None))
        if sources or function_name(node) not in _VIEWS:
            return input_nodes(tuple(sources))
        return input_nodes(node.args[:1])
    if mutated := mutated_args(node, gm):
        return mutated
    if (module := module_of(node, gm)) is not None:
        passes_through = isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd))
        return input_nodes(node.args[:1]) if passes_through else []
    if function_name(node) in _VIEWS:
        return input_nodes((node.args[:1], node.kwargs.get("input")))
    return []


def alias_roots(nodes: Iterable[fx.Node], gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes at which the storages of `nodes` may have begun, views followed back to their bases."""
    roots: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if sources := alias_sources(node, gm):
            pending.extend(sources)
        else:
            roots.add(node)
    return roots


def mutated_roots(nodes: Iterable[fx.Node], gm: fx.GraphModule) -> set[fx.Node]:
    """The alias roots of everything that `nodes` change in place."""
    return alias_roots((changed for node in nodes for changed in mutated_args(node, gm)), gm)


def nodes_between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """`first`, the nodes after it in graph order, and `last`."""
    node = first
    while True:
        yield node
        if node is last:
            return
        node = node.next
