"""Spellings of rotary embedding's tables -> the Op `rope_tables`.

Matches cos and sin of one `cat((angles, angles), -1)`, where the angles are float32 products of positions and
frequencies (broadcast, or a matmul of outer vectors, as older Llamas have it), each scaled and converted alike or not.
Replaces all of it; as the spellings differ in single nodes, they are walked and not matched by patterns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from burnish import ops
from burnish.rewrites.rewrite import GraphPass, Outcome, arguments, insert, same, value

aten = torch.ops.aten

_CONVERSIONS = (aten.to.dtype, aten.to.device, aten._to_copy.default)
_EXACT_IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def raise_rope_tables(graph_module: fx.GraphModule) -> Outcome:
    """`cos(cat((angles, angles))) * scaling` and its sine, in a dtype -> rope_tables(position_ids, inv_freq, ...)."""
    count, refused = 0, []
    for cos in [node for node in graph_module.graph.nodes if node.target is aten.cos.default]:
        if reason := _raise(graph_module, cos):
            refused.append(f"{cos.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _raise(graph_module: fx.GraphModule, cos: fx.Node) -> str | None:
    doubled: Any = cos.args[0]
    sines = [user for user in doubled.users if user.target is aten.sin.default]
    if len(sines) != 1:
        return f"there is no sine of {doubled.name} to its cosine"
    angles = _half(doubled)
    if angles is None:
        return f"{doubled.name} is not the same angles twice side by side"
    if value(angles).dtype != torch.float32:
        return f"the angles are {value(angles).dtype}, not torch.float32"
    factors = _factors(angles)
    if factors is None:
        return f"{angles.name} is not the product of positions and a vector of frequencies"
    position_ids, inv_freq = factors
    if not same([*value(position_ids).shape, 2 * value(inv_freq).shape[0]], list(value(cos).shape)):
        return f"{angles.name} repeats positions of shape {tuple(value(position_ids).shape)}"
    tables, scaling = _finished(cos, sines[0])
    dtype = str(value(tables[0]).dtype).removeprefix("torch.")
    in_order = sorted(tables)

    def build(position_ids: Any, inv_freq: Any) -> tuple[Any, ...]:
        made = ops.rope_tables(position_ids, inv_freq, dtype, scaling)
        return tuple(made[tables.index(node)] for node in in_order)

    return insert(graph_module, in_order, build, position_ids, inv_freq)


def _half(doubled: fx.Node) -> fx.Node | None:
    """What the node has twice along its last dimension."""
    if doubled.target is not aten.cat.default:
        return None
    parts, dim = arguments(doubled).values()
    alike = len(parts) == 2 and parts[0] is parts[1] and dim % value(doubled).dim() == value(doubled).dim() - 1
    return parts[0] if alike else None


def _factors(angles: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Positions, (S,) or (B, S), and frequencies, (D / 2,), whose products the angles are."""
    args: Any = angles.args
    last = value(angles).dim() - 1
    pairs: list[tuple[fx.Node | None, fx.Node | None]] = []
    if angles.target is aten.mul.Tensor and all(isinstance(arg, fx.Node) for arg in args):
        pairs = [(_positions(a, last), _frequencies(b, value(b).dim() - 1)) for a, b in (args, args[::-1])]
    elif angles.target is aten.transpose.int and last == 2 and {dim % 3 for dim in args[1:]} == {1, 2}:
        product = args[0]
        if product.target in (aten.matmul.default, aten.bmm.default):
            column, row = product.args
            if value(column).dim() == 3 and same(value(column).shape[2], 1):
                pairs = [(_positions(row, 1), _frequencies(column, 1))]
    for position_ids, inv_freq in pairs:
        if position_ids is not None and inv_freq is not None:
            return position_ids, inv_freq
    return None


def _positions(node: Any, dim: int) -> fx.Node | None:
    """The positions that `node` has with `dim`, of size 1, added."""
    node = _converted(node, _INTEGERS)
    if node.target is not aten.unsqueeze.default or node.args[1] % value(node).dim() != dim:
        return None
    source = _converted(node.args[0], _INTEGERS)
    taken = (*_INTEGERS, *_EXACT_IN_FLOAT32)
    return source if value(source).dim() in (1, 2) and value(source).dtype in taken else None


def _frequencies(node: Any, dim: int) -> fx.Node | None:
    """The vector that lies along `dim` of `node` and is repeated along all others."""
    while True:
        node = _converted(node)
        if value(node).dim() == 1:
            return node if value(node).dtype in _EXACT_IN_FLOAT32 else None
        source: Any = node.args[0] if node.args else None
        if node.target is aten.unsqueeze.default:
            added = node.args[1] % value(node).dim()
            if added == dim:
                return None
            dim -= added < dim
        elif node.target is aten.expand.default:
            shift = value(node).dim() - value(source).dim()
            if dim < shift or not same(value(source).shape[dim - shift], value(node).shape[dim]):
                return None
            dim -= shift
        else:
            return None
        node = source


def _converted(node: Any, also: tuple[torch.dtype, ...] = ()) -> Any:
    """What `node` converts to float32 where the Op, given the unconverted, does the same."""
    while node.target in _CONVERSIONS and value(node).dtype == torch.float32:
        source = node.args[0]
        if value(source).dtype not in (*_EXACT_IN_FLOAT32, *also) or value(source).device != value(node).device:
            break
        node = source
    return node


def _finished(cos: fx.Node, sin: fx.Node) -> tuple[list[fx.Node], float]:
    """Cosine and sine after the scaling and the conversion that are done to both alike and alone, and the scaling."""
    tables, scaling = [cos, sin], 1.0
    scaled = _only_users(tables, aten.mul.Tensor)
    factor: Any = scaled[0].args[1] if scaled else None
    if type(factor) in (int, float):
        tables, scaling = scaled, float(factor)
    for target in (*_CONVERSIONS, aten.type_as.default):
        found = _only_users(tables, target)
        if found and value(found[0]).is_floating_point() and value(found[0]).device == value(cos).device:
            return found, scaling
    return tables, scaling


def _only_users(nodes: list[fx.Node], target: Any) -> list[fx.Node]:
    """Of each node the only user, if all of these call `target` with the same other arguments; else none."""
    found = [user for node in nodes for user in node.users]
    alike = len({(str(user.args[1:]), str(user.kwargs)) for user in found}) == 1
    return found if len(found) == len(nodes) and alike and all(user.target is target for user in found) else []


ROPE_TABLES = [GraphPass("rope_tables", raise_rope_tables)]
