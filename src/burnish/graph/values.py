"""What is known about values: ranks, sizes, and when two of them are the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from burnish.graph.normalize import Call, is_symbolic_value


def rank_of(node: fx.Node, call: Call) -> int | None:
    """The rank that a `dim` of this call counts in, where the shapes are known."""
    source = node if call.key in ("unsqueeze", "stack") else call.args.get("self", node)
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) and value.dim() else None


def is_size_like(node: fx.Node) -> bool:
    """Whether a node holds an integer: known by its value, or by being computed from a shape."""
    if "val" in node.meta:
        return is_symbolic_value(node) or type(node.meta["val"]) is int
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "getattr":
        return node.args[1] in ("shape", "ndim")
    arithmetic = ("getitem", "add", "sub", "mul", "floordiv", "mod")
    return name in arithmetic and all(is_size_like(n) for n in node.all_input_nodes)


def attribute_of(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def same_value(a: Any, b: Any) -> bool:
    """Whether two bound values are one: the same node, or constants of one type and value (NaN equals NaN)."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and bool(a == b)
