"""Which Impl each Op of a graph for Inductor runs by: measured on inputs like those that the graph will get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from burnish.lower import op_of
from burnish.op import Op
from burnish.ops import embedding_backward
from burnish.ops._common import HALF_TYPES
from burnish.tuning import Tuner

_ENDS = "cu_seqlens"


def choose_impls(graph_module: fx.GraphModule, tuner: Tuner) -> None:
    """Tells every Op node which Impl to prefer, in place; measures what is not known yet, each signature once.

    First, what Ops do as they read is left to them: under autocast the cast of a gradient in bfloat16 to the float32
    that was normalized.
    """
    _drop_widening_casts(graph_module)
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
    if op is embedding_backward and 0 not in found[1].stride():
        _spread(found[1], found[2])
    return tuple(found)


def _spread(ids: Tensor, entries: int) -> None:
    """As words are in a text: the second most frequent one is half as frequent as the first, and so on.

    By Zipf's law; with one id for all, the time would be that of a single row's sum.
    """
    generator = torch.Generator(ids.device).manual_seed(0)
    share = torch.rand(ids.shape, generator=generator, device=ids.device, dtype=torch.float64)
    ids.copy_((float(entries) ** share).long() - 1)


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
