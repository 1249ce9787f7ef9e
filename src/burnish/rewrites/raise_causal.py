"""Masks that hide what comes after the query, and nothing else -> `attention(is_causal=True)`.

A causal mask that a model keeps as a buffer (nanoGPT's `bias`) or makes with `tril` and `triu` reaches attention as one
more input to read, and its kernels compute all that it hides. What tells such a mask is its values, never its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.places import find_weight
from burnish.rewrites.position_masks import causal_shift
from burnish.rewrites.rewrite import Outcome, arguments, same, value

aten = torch.ops.aten

LOOKED_AT = "looked at"
"""Key in a graph module's `meta`: of the buffers whose values were looked at, by path, the versions that were seen."""

_PARAMETERS = list(ops.attention.signature.parameters)
_BIAS, _IS_CAUSAL = _PARAMETERS.index("bias"), _PARAMETERS.index("is_causal")
_HIDDEN = -1e3  # what an additive mask has at most where it hides
_SAMPLE = 4  # rows and columns that stand for any number of them
_CREATED = (aten.ones.default, aten.full.default)
_TRIANGLES = (aten.tril.default, aten.triu.default)
_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.select.int, aten.contiguous.default, aten.alias.default),
)
_BY_ENTRY = (
    *(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar),
    *(aten.bitwise_not.default, aten.logical_not.default, aten.mul.Tensor, aten.sub.Tensor, aten.rsub.Scalar),
    *(aten.to.dtype, aten.to.device, aten._to_copy.default),
)


def raise_causal_masks(graph_module: fx.GraphModule) -> Outcome:
    """attention(bias=mask[..., :T, :T]) -> attention(is_causal=True), where the mask is a lower triangle."""
    count, refused = 0, []
    seen: dict[str, int] = graph_module.meta.setdefault(LOOKED_AT, {})
    for node in graph_module.graph.nodes:
        if node.target is not ops.attention.overload:
            continue
        args = list(ops.attention.bind(*node.args, **node.kwargs))
        mask = _mask_of(args[_BIAS])
        if mask is None:
            shift = causal_shift(args[_BIAS])
            queries, keys = (value(t).shape[2] for t in args[:2])
            if shift is not None and same(shift, keys - queries) and not args[_IS_CAUSAL]:
                args[_BIAS], args[_IS_CAUSAL] = None, True
                node.args, node.kwargs = tuple(args), {}
                count += 1
            continue
        if reason := _why_not_causal(graph_module, mask, args[0], args[1], args[_BIAS]):
            refused.append(f"{node.name}: {reason}")
            continue
        if mask.source.op == "get_attr":
            path = str(mask.source.target)
            seen[path] = _tensor(graph_module, path)._version
        args[_BIAS], args[_IS_CAUSAL] = None, True
        node.args, node.kwargs = tuple(args), {}
        count += 1
    return Outcome(count, tuple(refused))


@dataclass(frozen=True)
class _Mask:
    """A mask whose every entry is computed from one entry of a matrix.

    source: the node of the matrix, a weight's or one that makes it. steps: what is computed of it, in order.
    first_row: which row of the matrix is the mask's first; its first column is the matrix's.
    """

    source: fx.Node
    steps: tuple[fx.Node, ...]
    first_row: Any

    @property
    def is_created(self) -> bool:
        return self.source.op == "call_function"

    def entries(self, matrix: Tensor) -> Tensor:
        for step in self.steps:
            matrix = step.target(matrix, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        return matrix


def _mask_of(bias: Any) -> _Mask | None:
    """How a bias is computed from one matrix; None where it is not, or where more than its entries decide."""
    steps: list[fx.Node] = []
    first_row: Any = 0
    node = bias
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target not in _CREATED:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(value(source), Tensor):
            return None
        if node.target is aten.slice.Tensor:
            given = {name: value(arg) for name, arg in arguments(node).items() if name != "self"}
            dim = given["dim"] % value(source).dim() - value(source).dim()
            start = 0 if given["start"] is None else given["start"]
            if (dim >= -2 and given["step"] != 1) or (dim == -1 and not same(start, 0)):
                return None
            first_row = first_row + start if dim == -2 else first_row
        elif node.target in _VIEWS:
            if not same(value(node).shape[-2:], value(source).shape[-2:]):
                return None
        elif node.target in (*_BY_ENTRY, *_TRIANGLES) and not any(
            isinstance(arg, fx.Node) for arg in (*node.args[1:], *node.kwargs.values())
        ):
            steps.insert(0, node)
        else:
            return None
        node = source
    if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function") or len(value(node).shape) < 2:
        return None
    triangles = [step for step in steps if step.target in _TRIANGLES]
    if triangles and not (same(first_row, 0) and all(abs(arguments(each)["diagonal"]) < 2 for each in triangles)):
        return None  # these look at where an entry stands, and the sample is small
    return _Mask(node, tuple(steps), first_row)


def _why_not_causal(graph_module: fx.GraphModule, mask: _Mask, q: fx.Node, k: fx.Node, bias: fx.Node) -> str | None:
    """Why `mask` is not causality for these queries and keys; None where it is."""
    queries, keys = value(q).shape[2], value(k).shape[2]
    where = mask.source.name if mask.is_created else mask.source.target
    if not same(value(bias).shape[-2:], (queries, keys)):
        return f"its bias of {tuple(value(bias).shape)} is not one row for each query"
    with torch.no_grad():
        if mask.is_created:
            rest, kwargs = mask.source.args[1:], mask.source.kwargs | {"device": "cpu"}
            matrix = mask.source.target((_SAMPLE, _SAMPLE), *rest, **kwargs)  # type: ignore[operator]
        else:
            matrix = _tensor(graph_module, str(mask.source.target))
            if type(matrix) is not Tensor or matrix.is_meta or matrix.is_inference():
                return f"the values of {where} are not here, or may change unseen"
        if not _is_lower_triangle(mask.entries(matrix)):
            return f"its bias, made of {where}, is no lower triangle"
    if not same(mask.first_row + queries, keys):
        return f"{where} is read from row {mask.first_row} on, which need not be the first query's"
    return None


def _tensor(graph_module: fx.GraphModule, path: str) -> Any:
    place = find_weight((graph_module,), path)
    return place.owner[place.name]


def _is_lower_triangle(mask: Tensor) -> bool:
    """Whether each matrix of a boolean or additive mask allows what is not above the diagonal, and hides the rest."""
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == lower).all())
    return mask.is_floating_point() and bool(torch.where(lower, mask == 0, mask <= _HIDDEN).all())
