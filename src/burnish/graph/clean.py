"""Remove from an exported graph what computes nothing: checks, copies to where the value already is, repeated work."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from burnish.graph._words import words
from burnish.graph.effects import alias_roots, input_nodes, is_pure, mutated_roots
from burnish.graph.normalize import INT64_MAX, canonical

_CHECKS = words("_assert_tensor_metadata _assert_scalar sym_constrain_range sym_constrain_range_for_size")
_RESHAPES = words("view reshape _unsafe_view expand flatten squeeze")
_DROPOUTS = words("dropout feature_dropout alpha_dropout feature_alpha_dropout")
_COPIES = words("_to_copy lift_fresh_copy add sub mul div")  # results with a storage of their own


def clean(gm: fx.GraphModule) -> int:
    """Remove no-ops, checks, repeated pure nodes and dead code from an ATen graph, in place.

    Returns the number of nodes removed. Every removal is proven by `meta["val"]`, also where sizes are symbolic; what
    cannot be proven stays. In-place operators, random operators and whatever they touch are never removed or merged.
    """
    before = len(gm.graph.nodes)
    _drop_checks(gm)
    _drop_no_ops(gm)
    _merge_repeats(gm)
    _drop_dead(gm)
    removed = before - len(gm.graph.nodes)
    if removed:
        gm.graph.lint()
        gm.recompile()
    return removed


NEEDS_GRADIENT = "needs gradient"
"""Key in the meta of an input whose `val`, which was traced, does not tell that it requires gradients."""


def _needing_gradients(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes through which a backward pass would go: a detach of one of these does something."""
    tracked: set[fx.Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        results = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(result, torch.Tensor) and result.is_floating_point() for result in results):
            given = node.op in ("placeholder", "get_attr")
            source = given and (results[0].requires_grad or node.meta.get(NEEDS_GRADIENT))
            passes = any(n in tracked for n in node.all_input_nodes) and _aten_name(node) != "detach"
            if source or passes:
                tracked.add(node)
    return tracked


def _aten_name(node: fx.Node) -> str:
    if (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
    ):
        return node.target._schema.name.rpartition("::")[2]
    return ""


def _drop_checks(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        guards = node.op == "call_module" and node.target == "_guards_fn"
        if not node.users and (guards or _aten_name(node) in _CHECKS):
            gm.graph.erase_node(node)
            if guards:
                gm.delete_submodule("_guards_fn")


def _drop_no_ops(gm: fx.GraphModule) -> None:
    mutated = mutated_roots(gm.graph.nodes, gm)
    returned = alias_roots(input_nodes(gm.graph.output_node().args), gm)
    tracked = _needing_gradients(gm)
    for node in list(gm.graph.nodes):
        name = _aten_name(node)
        if not name or not node.users or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if not _changes_nothing(name, node, source, canonical(node, gm).args):
            continue
        if name == "detach" and source in tracked:
            continue
        # A copy has a storage of its own: that matters to whoever writes to it, to its source, or receives it.
        if name in _COPIES and (node in mutated or node in returned or alias_roots([source], gm) & mutated):
            continue
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


def _changes_nothing(name: str, node: fx.Node, source: fx.Node, args: dict[str, Any]) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    rule = _RULES.get(name)
    return rule is not None and before.dtype == after.dtype and rule(before, after, args)


def _same_place(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    kept_format = args.get("memory_format") in (None, torch.preserve_format)
    return before.device == after.device and before.layout == after.layout and not args.get("copy") and kept_format


def _is_contiguous(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    if args["memory_format"] != torch.contiguous_format or before.layout != torch.strided:
        return False
    expected: Any = 1
    for size, stride in zip(reversed(before.shape), reversed(before.stride()), strict=True):
        if not _known_equal(size, 1) and not _known_equal(stride, expected):
            return False
        expected = expected * size
    return True


def _same_shape(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    return before.dim() == after.dim() and all(map(_known_equal, before.shape, after.shape))


def _known_equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _is_identity_permutation(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    return all(dim % before.dim() == i for i, dim in enumerate(args["dims"]))


def _is_identity_transpose(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    rank = max(before.dim(), 1)
    return bool(args["dim0"] % rank == args["dim1"] % rank)


def _is_whole_slice(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    whole = args["start"] == 0 and args["end"] == INT64_MAX if isinstance(args["start"], int) else False
    return args["step"] == 1 and (whole or _same_shape(before, after, args))


def _adds_nothing(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    # A float 0 is no identity: it turns -0.0 into 0.0.
    return not before.is_floating_point() and _is_number(args["other"], 0)


def _multiplies_by_one(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    return _is_number(args["other"], 1)


def _is_number(value: Any, number: int) -> bool:
    return type(value) in (int, float) and value == number


def _never_drops(before: torch.Tensor, after: torch.Tensor, args: dict[str, Any]) -> bool:
    return args["train"] is False or args["p"] == 0


_RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], bool]] = {
    "to": _same_place,
    "_to_copy": _same_place,
    "type_as": _same_place,
    "alias": lambda *_: True,
    "lift_fresh_copy": lambda *_: True,
    "detach": lambda *_: True,
    "contiguous": _is_contiguous,
    "add": _adds_nothing,
    "sub": _adds_nothing,
    "mul": _multiplies_by_one,
    "div": lambda before, after, args: args.get("rounding_mode") is None and _multiplies_by_one(before, after, args),
    "permute": _is_identity_permutation,
    "transpose": _is_identity_transpose,
    "slice": _is_whole_slice,
    **dict.fromkeys(_RESHAPES, _same_shape),
    **dict.fromkeys(_DROPOUTS, _never_drops),
}


def _merge_repeats(gm: fx.GraphModule) -> None:
    """Compute equal things once: same operator, same arguments, and nothing written to in between."""
    nodes = gm.graph.nodes
    mutated = mutated_roots(nodes, gm)
    returned = set(input_nodes(gm.graph.output_node().args))
    first: dict[Hashable, fx.Node] = {}
    for node in list(nodes):
        if node in returned or not _is_mergeable(node, gm):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        if key not in first:
            first[key] = node
            continue
        if mutated and alias_roots([node, first[key], *node.all_input_nodes], gm) & mutated:
            continue
        node.replace_all_uses_with(first[key])
        gm.graph.erase_node(node)


def _is_mergeable(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or not is_pure(node, gm):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not _aten_name(node).startswith(("empty", "new_empty"))
    return getattr(node.target, "__module__", None) in (operator.__name__, "_operator", math.__name__, "torch")


def _hashable(arg: Any) -> Hashable:
    """A key that tells 1, 1.0 and True apart."""
    if isinstance(arg, (list, tuple)):
        return tuple(_hashable(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _hashable(v)) for k, v in arg.items())
    if isinstance(arg, slice):
        return (slice, _hashable((arg.start, arg.stop, arg.step)))
    return arg if isinstance(arg, fx.Node) else (type(arg), repr(arg) if isinstance(arg, float) else arg)


def _drop_dead(gm: fx.GraphModule) -> None:
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and is_pure(node, gm):
            gm.graph.erase_node(node)
