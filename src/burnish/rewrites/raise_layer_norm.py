"""Spellings of a layer norm that is written out -> the Op: (x - mean) / sqrt(variance + eps) * weight + bias.

First what normalizes becomes `layer_norm` without weights, and then each weight that follows becomes one of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.graph.matcher import Match
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, value, values

aten = torch.ops.aten

# By spelling: the operator that tells it, and what it computes.
_VARIANCES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "var": (aten.var.dim, lambda x, centred: x.var(-1, unbiased=False, keepdim=True)),
    "corrected var": (aten.var.correction, lambda x, centred: x.var(-1, correction=0, keepdim=True)),
    "mean of squares": (aten.pow.Tensor_Scalar, lambda x, centred: centred.pow(2).mean(-1, keepdim=True)),
}
_ROOTS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "over sqrt": (aten.sqrt.default, lambda variance, centred: centred / torch.sqrt(variance)),
    "times rsqrt": (aten.rsqrt.default, lambda variance, centred: centred * torch.rsqrt(variance)),
    "weighted, over sqrt": (aten.sqrt.default, lambda variance, centred, w: w * centred / torch.sqrt(variance)),
}


def _spelling(variance: str, root: str) -> Rewrite:
    (variance_anchor, variance_of), (root_anchor, divided) = _VARIANCES[variance], _ROOTS[root]
    names = ["x", "eps", "weight"][: len(inspect.signature(divided).parameters)]

    def pattern(x: Tensor, eps: float, *weight: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return divided(variance_of(x, centred) + eps, centred, *weight)

    def replacement(x: Any, eps: float, weight: Any = None) -> Any:
        return ops.layer_norm(x, weight, None, eps)

    def examples(dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(2, 3, 8, dtype=dtype), 1.2345e-5, torch.randn(8, dtype=dtype))[: len(names)]

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    for function in (pattern, replacement):
        setattr(function, "__signature__", inspect.Signature(parameters))  # noqa: B010
    anchors = (variance_anchor, root_anchor, aten.sub.Tensor)
    return Rewrite(f"layer_norm: {variance}, {root}", pattern, replacement, examples, anchors, refuse_weights)


def refuse_weights(match: Match) -> str | None:
    """Why a norm of `x` cannot take its `weight` or `bias`; None where it can."""
    (x,) = values(match, "x")
    for name in ("weight", "bias"):
        given = value(match.bindings.get(name))
        if isinstance(given, (int, float)):
            return f"{name} is the number {given}"
        if given is not None and (given.dim() != 1 or given.shape[0] != x.shape[-1]):
            return f"{name} of shape {tuple(given.shape)} is not one number for each of the last dim"
        if given is not None and torch.result_type(x, given) != x.dtype:
            return f"the result is {torch.result_type(x, given)}, x is {x.dtype}"
    return None


# --- its weights ----------------------------------------------------------------------------------


def then_weight(x: Any, eps: float, weight: Any) -> Any:
    return aten.mul.Tensor(ops.layer_norm(x, None, None, eps), weight)


def to_weighted(x: Any, eps: float, weight: Any) -> Any:
    return ops.layer_norm(x, weight, None, eps)


def then_bias(x: Any, eps: float, weight: Any, bias: Any) -> Any:
    return aten.add.Tensor(ops.layer_norm(x, weight, None, eps), bias)


def to_biased(x: Any, eps: float, weight: Any, bias: Any) -> Any:
    return ops.layer_norm(x, weight, bias, eps)


# --- what only looks like it ----------------------------------------------------------------------


def tell_of_standard_deviations(graph_module: fx.GraphModule) -> Outcome:
    """(x - mean) / (std + eps), as in "The Annotated Transformer", is another function."""
    reason = "eps is added to the standard deviation, where a layer norm adds it to the variance"
    divisions = (node for node in graph_module.graph.nodes if node.target is aten.div.Tensor)
    return Outcome(0, tuple(f"{node.name}: {reason}" for node in divisions if _is_std_and_eps(node.args[1])))


def _is_std_and_eps(divisor: Any) -> bool:
    if not isinstance(divisor, fx.Node) or divisor.target is not aten.add.Tensor:
        return False
    return any(node.target in (aten.std.dim, aten.std.correction) for node in divisor.all_input_nodes)


def _layer_norms() -> Iterator[Rewrite]:
    for root in reversed(_ROOTS):  # the wider ones first
        for variance in _VARIANCES:
            yield _spelling(variance, root)
    op = ops.layer_norm.overload
    yield Rewrite("layer_norm: weight", then_weight, to_weighted, None, (op, aten.mul.Tensor), refuse_weights)
    yield Rewrite("layer_norm: bias", then_bias, to_biased, None, (op, aten.add.Tensor), refuse_weights)


LAYER_NORM_WRITTEN_OUT: list[Rewrite | GraphPass] = [
    *_layer_norms(),
    GraphPass("layer_norm: standard deviation", tell_of_standard_deviations),
]
