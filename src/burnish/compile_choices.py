"""Which Impl each Op of a graph for Inductor runs by: measured on inputs like those that the graph will get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from burnish.lower import op_of
from burnish.op import Op
from burnish.ops import layer_norm_backward, rms_norm_backward
from burnish.ops._common import HALF_TYPES
from burnish.tuning import Tuner

_ENDS = "cu_seqlens"


def choose_impls(graph_module: fx.GraphModule, tuner: Tuner) -> None:
    """Tells every Op node which Impl to prefer, in place; measures what is not known yet, each signature once.

    First, what Ops do as they read and write is left to them: under autocast the cast of a gradient in bfloat16 to the
    float32 that was normalized, and the addition of the gradient that comes over a residual connection.
    """
    _drop_widening_casts(graph_module)
    _add_within_norms(graph_module)
    with unset_fake_temporarily(), torch.no_grad():  # AOTAutograd compiles under the mode that it traced with
        for node in graph_module.graph.nodes:
            op = op_of(node.target) if node.op == "call_function" else None
            if op is None or len(op.impls) == 1:
                continue
            args = _like(op, op.bind(*node.args, **node.kwargs))
            if args is not None:
                _, choice = tuner.choose(op, args, budget_us=tuner.FIRST_BUDGET_US, thorough=True)
                node.kwargs = {**node.kwargs, "impl": choice.candidate}
    tuner.save()
    graph_module.recompile()


def _drop_widening_casts(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        for place in op.widens if op is not None else ():
            cast = node.args[place] if place < len(node.args) else None
            if isinstance(cast, fx.Node) and cast.target is torch.ops.prims.convert_element_type.default:
                source: Any = cast.args[0]
                if source.meta["val"].dtype in HALF_TYPES and cast.meta["val"].dtype == torch.float32:
                    node.update_arg(place, source)
    graph_module.graph.eliminate_dead_code()


def _add_within_norms(graph_module: fx.GraphModule) -> None:
    """`dx + gradient` of a norm's backward pass -> its `grad_sum`, which costs one read; Inductor reads both again and
    writes."""
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or op_of(node.target) not in (layer_norm_backward, rms_norm_backward):
            continue
        op: Any = op_of(node.target)
        args, place = list(op.bind(*node.args, **node.kwargs)), list(op.signature.parameters).index("grad_sum")
        dx = next((user for user in node.users if user.args[1] == 0), None)
        if args[place] is not None or dx is None or len(dx.users) != 1:
            continue
        add = next(iter(dx.users))
        if add.target is not torch.ops.aten.add.Tensor or len(add.args) != 2 or add.kwargs or add.args.count(dx) != 1:
            continue
        other: Any = add.args[1 - add.args.index(dx)]
        value, whole = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (other, dx))
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (whole.shape, whole.dtype):  # type: ignore[union-attr]
            continue
        if order[other] > order[node]:
            continue
        args[place] = other
        node.args, node.kwargs = tuple(args), {}
        values = tuple(a.meta["val"] if isinstance(a, fx.Node) else a for a in args)
        node.meta["eager_input_vals"] = (values, {})  # by which Inductor lays inputs out
        add.replace_all_uses_with(dx)
        graph_module.graph.erase_node(add)


def _like(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Random inputs of these sizes, dtypes and strides; None where a size is not known before the call."""
    found: list[Any] = []
    for name, arg in zip(op.signature.parameters, args, strict=True):
        value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            value = value.node.hint
        elif isinstance(value, Tensor):
            value = _tensor_like(value, evenly=name.startswith(_ENDS), rows=_rows(found))
        if value is None and isinstance(arg, fx.Node):
            return None
        found.append(value)
    return tuple(found)


def _tensor_like(fake: Tensor, evenly: bool, rows: int) -> Tensor | None:
    sizes, strides = ([_known(size) for size in numbers] for numbers in (fake.shape, fake.stride()))
    if None in sizes or None in strides:
        return None
    real = torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device)  # type: ignore[arg-type]
    if evenly:
        return real.copy_(torch.linspace(0, rows, real.numel()))
    if fake.is_floating_point():
        return real.normal_(
            generator=torch.Generator(fake.device).manual_seed(0)
        )  # the model's own draws stay as they are
    return real.fill_(1)


def _known(size: int | torch.SymInt) -> int | None:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _rows(found: list[Any]) -> int:
    return next((value.shape[0] for value in found if isinstance(value, Tensor)), 0)
