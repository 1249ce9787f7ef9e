"""The user's own rewrites: they run before the others, which have to understand what their replacements call."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, value


def check_rewrites(rewrites: Any) -> None:
    """TypeError for what is no sequence of Rewrites."""
    if not isinstance(rewrites, Sequence):
        raise TypeError(f"rewrites: a list of burnish.Rewrite is needed, not {type(rewrites).__name__}")
    for i, rewrite in enumerate(rewrites):
        if not isinstance(rewrite, Rewrite):
            raise TypeError(f"rewrites[{i}]: a burnish.Rewrite is needed, not {type(rewrite).__name__}")


def own(rewrites: Iterable[Rewrite | GraphPass]) -> list[Rewrite | GraphPass]:
    """The user's rewrites as a step, to be run before RAISE."""
    return [*rewrites, GraphPass("in ATen", written_in_aten)]


def written_in_aten(graph_module: fx.GraphModule) -> Outcome:
    """Methods, attributes and functions of tensors, such as `x.transpose(1, 2)`, become the ATen operators that they
    call. Counts nothing: it is part of what the rewrites before it did. ValueError for a call whose result's shape
    cannot be known."""
    for node in list(graph_module.graph.nodes):
        if _is_call_of_python(node):
            _write_out(graph_module.graph, node)
    return Outcome(0)


def _is_call_of_python(node: fx.Node) -> bool:
    if node.meta.get("origin") == node.name or isinstance(node.target, torch._ops.OpOverload):
        return False  # as it was captured, or an operator
    of_tensors = any(isinstance(value(given), Tensor) for given in node.all_input_nodes)
    # Python's own arithmetic on sizes, and the parts of a tuple, are what a captured graph has, too.
    python = node.op == "call_function" and (of_tensors or node.target not in vars(operator).values())
    return python or node.op == "call_method"


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    if any("val" not in each.meta for each in (node, *inputs)):
        raise ValueError(f"{node.name}: its shape cannot be known; call an operator of torch.ops.aten instead")

    def call(*values: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(inputs, values, strict=True)).__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    fakes = [each.meta["val"] for each in inputs]
    mode = detect_fake_mode((fakes, node.meta["val"]))
    with mode or contextlib.nullcontext(), torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*fakes)
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        result: Any = graph.graph_copy(traced.graph, copies)
    for made in copies.values():
        if made not in inputs:
            made.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if isinstance(result, fx.Node):
        _stand_in(result, node)
        return
    for part in list(node.users):
        if part.target is not operator.getitem:
            raise ValueError(f"{node.name}: take the parts of its result by their numbers")
        _stand_in(result[part.args[1]], part)
    graph.erase_node(node)


def _stand_in(new: fx.Node, old: fx.Node) -> None:
    """Puts `new` where `old` stands, with what is told of it."""
    if new.meta.get("origin") is None:  # else it is an input of the call, which returned it as it was
        new.meta |= {key: told for key, told in old.meta.items() if key != "val"}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
