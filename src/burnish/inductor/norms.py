"""What the backward passes of norms do besides, in graphs for Inductor: they have whole rows in registers.

Around a norm's backward Op the graph goes over the same rows again and again: it adds the gradient that comes over a
residual connection, casts the sum to half precision for the products in front of it, adds that up over all rows for the
gradient of their bias, and works out the norm's own result again for the product behind it. Each is a pass over memory;
the Op's kernel does all of them for what it writes.
"""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from burnish.inductor.nodes import call, move_behind, needing, value_of
from burnish.inductor.sums import readers, replace_sums, sums_of_rows
from burnish.lower import op_of
from burnish.op import Op
from burnish.ops import layer_norm_backward, rms_norm_backward
from burnish.ops._common import HALF_TYPES

Statistics: TypeAlias = dict[str, tuple[Any, ...]]
"""By a node's name what it is: ("mean", x) or ("rstd", x, eps) of layer norm or ("rms", x, eps), x by its name."""

_WIDEST = 8192  # of wider rows the kernel has no registers for more
_OPS = (layer_norm_backward, rms_norm_backward)
_NARROW, _SUM, _NORMED = -3, -2, -1  # among the results

_aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)


def use_norms(graph_module: fx.GraphModule, statistics: Statistics) -> None:
    """Has the backward passes of norms do what the graph around them does, in place.

    `statistics` are those of the graphs seen so far of the same model, to which this one's are added: a backward graph
    gets those of the forward graph as inputs, which AOTAutograd names as the forward graph's nodes.
    """
    graph = graph_module.graph
    graph.eliminate_dead_code()  # who reads what is asked below
    statistics.update(_statistics(graph))
    for node in [n for n in graph.nodes if n.op == "call_function" and op_of(n.target) in _OPS]:
        _add_within(node)
        if node.args[1].meta["val"].shape[-1] <= _WIDEST:
            _take_narrow(node)
            _take_sum(node)
            _take_normed(node, statistics)
    graph.eliminate_dead_code()
    graph_module.recompile()


# --- dx: the sum, its copy, its column sums ---------------------------------------------------------------------------


def _add_within(node: fx.Node) -> None:
    """`dx + gradient` -> the Op's `grad_sum`, which costs one read; Inductor reads both again and writes."""
    dx = _result(node, 0)
    if _argument(node, "grad_sum") is not None or dx is None or len(dx.users) != 1:
        return
    add = next(iter(dx.users))
    if add.target is not _aten.add.Tensor or len(add.args) != 2 or add.kwargs or add.args.count(dx) != 1:
        return
    other: Any = add.args[1 - add.args.index(dx)]
    value, whole = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (other, dx))
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (whole.shape, whole.dtype):  # type: ignore[union-attr]
        return
    if node < other:
        return
    _ask(node, grad_sum=other)
    add.replace_all_uses_with(dx)
    node.graph.erase_node(add)


def _take_narrow(node: fx.Node) -> None:
    """The cast of dx to half precision, for products -> the Op's `narrow`."""
    dx = _result(node, 0)
    casts = [user for user in dx.users if _is_narrowing(user)] if dx is not None else []
    if not casts or not any(user.target in _PRODUCTS for user in readers(casts[0])):
        return
    dtype = casts[0].meta["val"].dtype
    _ask(node, narrow=dtype)
    narrow = _new_result(node, _NARROW)
    for cast in casts:
        if cast.meta["val"].dtype == dtype:
            cast.replace_all_uses_with(narrow)
            node.graph.erase_node(cast)


def _take_sum(node: fx.Node) -> None:
    """The sum of dx over all rows, or of its copy -> the Op's `dx_sum`."""
    sources = [n for n in (_result(node, 0), _result(node, _NARROW)) if n is not None]
    x = node.args[1].meta["val"]  # type: ignore[union-attr]
    sums = [each for source in sources for each in sums_of_rows(source, x.shape[-1], (*HALF_TYPES, x.dtype))]
    if sums:
        _ask(node, dx_sum=True)
        replace_sums(sums, _new_result(node, _SUM))


# --- the norm's own result --------------------------------------------------------------------------------------------


def _take_normed(node: fx.Node, statistics: Statistics) -> None:
    """The normalized x in half precision, worked out again for products -> the Op's `normed`.

    The products come before the norm's backward pass, of which they need nothing else: they are moved behind it, with
    what needs them. Where the norm's backward pass itself does, all stays.
    """
    graph = node.graph
    for cast in graph.nodes:
        if cast is node:
            return
        if _is_narrowing(cast) and _is_normed(cast.args[0], node, statistics):
            break
    else:
        return
    if not all(user.target in _PRODUCTS for user in readers(cast)):
        return
    moved = needing(cast, node)
    if moved is None:
        return
    _ask(node, normed=cast.meta["val"].dtype)
    normed = _new_result(node, _NORMED)
    move_behind(normed, moved)
    cast.replace_all_uses_with(normed)
    graph.erase_node(cast)


def _is_normed(value: Any, norm: fx.Node, statistics: Statistics) -> bool:
    """Whether it is the very result whose gradient the Op is given: of its x, weight, bias and eps."""
    rms = op_of(norm.target) is rms_norm_backward
    x, eps = norm.args[1], _argument(norm, "eps")
    if value.meta["val"].dtype != torch.float32:
        return False
    bias = None if rms else _argument(norm, "bias")
    for vector, by in ((bias, _aten.add.Tensor), (_argument(norm, "weight"), _aten.mul.Tensor)):
        if vector is not None:
            rest = [other for one, other in _two(value, by) if _source(one) is vector]
            if len(rest) != 1:
                return False
            (value,) = rest
    kind = ("rms" if rms else "rstd", _name(x), eps)
    rest = [other for one, other in _two(value, _aten.mul.Tensor) if statistics.get(_name(one)) == kind]
    if len(rest) != 1:
        return False
    if rms:
        return _source(rest[0]) is x
    centred = rest[0]
    if not isinstance(centred, fx.Node) or centred.target is not _aten.sub.Tensor or centred.kwargs:
        return False
    minuend, mean = centred.args
    return _source(minuend) is x and statistics.get(_name(mean)) == ("mean", _name(x))


def _two(value: Any, target: Any) -> list[tuple[Any, Any]]:
    """The operands of the addition or product that `value` is, either first."""
    if not isinstance(value, fx.Node) or value.target is not target or len(value.args) != 2 or value.kwargs:
        return []
    one, other = value.args
    return [(one, other), (other, one)]


def _statistics(graph: fx.Graph) -> Statistics:
    """As Inductor's decomposition of layer norm and our spelling of RMS norm have them, of rows of float32."""
    found: Statistics = {}
    for node in graph.nodes:
        if node.target is operator.getitem and node.args[1] == 1:
            x = _of_variance(node.args[0])
            if x is not None:
                found[node.name] = ("mean", x)
        elif node.target is _aten.rsqrt.default:
            added = node.args[0]
            if added.target is not _aten.add.Tensor or len(added.args) != 2 or not isinstance(added.args[1], float):
                continue
            variance, eps = added.args
            if variance.target is operator.getitem and variance.args[1] == 0:
                x = _of_variance(variance.args[0])
                if x is not None:
                    found[node.name] = ("rstd", x, eps)
            elif variance.target is _aten.mean.dim:
                x = _of_mean_square(variance)
                if x is not None:
                    found[node.name] = ("rms", x, eps)
    return found


def _of_mean_square(node: fx.Node) -> str | None:
    """The name of the x whose squares' mean over the last dimension it is."""
    square: Any
    square, dims, *keepdim = node.args
    if square.target is not _aten.pow.Tensor_Scalar or square.args[1] != 2 or keepdim != [True] or node.kwargs:
        return None
    return _name(square.args[0]) if square.meta["val"].dtype == torch.float32 and _is_last(dims, square) else None


def _of_variance(node: fx.Node) -> str | None:
    """The name of the x of which it is variance and mean over the last dimension."""
    if node.target is not _aten.var_mean.correction or node.kwargs != {"correction": 0, "keepdim": True}:
        return None
    x: Any
    x, *dims = node.args
    return _name(x) if x.meta["val"].dtype == torch.float32 and dims and _is_last(dims[0], x) else None


def _is_last(dims: Any, x: Any) -> bool:
    return dims is not None and list(dims) in ([-1], [x.meta["val"].dim() - 1])


def _name(node: Any) -> str:
    """The name of what it is a cast to float32 of; "" of no node."""
    source = _source(node)
    return source.name if isinstance(source, fx.Node) else ""


def _source(node: Any) -> Any:
    """What it is a cast to float32 of, else itself."""
    if isinstance(node, fx.Node) and node.target is _CAST and node.meta["val"].dtype == torch.float32:
        source: Any = node.args[0]
        return source if source.meta["val"].dtype in HALF_TYPES else node
    return node


# --- nodes ------------------------------------------------------------------------------------------------------------


def _ask(node: fx.Node, **changes: Any) -> None:
    """Gives the Op's node other arguments, and says what its results are then."""
    op: Any = op_of(node.target)
    named = dict(zip(op.signature.parameters, op.bind(*node.args, **node.kwargs), strict=True)) | changes
    node.args, node.kwargs = tuple(named.values()), {}
    values = tuple(value_of(a) for a in node.args)
    node.meta["eager_input_vals"] = (values, {})  # by which Inductor lays inputs out
    with node.meta["val"][0].fake_mode:
        node.meta["val"] = node.target(*values)  # type: ignore[operator]


def _argument(node: fx.Node, name: str) -> Any:
    op: Op = op_of(node.target)  # type: ignore[assignment]
    return op.bind(*node.args, **node.kwargs)[list(op.signature.parameters).index(name)]


def _result(node: fx.Node, place: int) -> fx.Node | None:
    place %= len(node.meta["val"])
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == place), None)


def _new_result(node: fx.Node, place: int) -> fx.Node:
    with node.graph.inserting_after(node):
        return call(operator.getitem, node, place % len(node.meta["val"]))


def _is_narrowing(node: fx.Node) -> bool:
    return node.target is _CAST and node.meta["val"].dtype in HALF_TYPES
