"""Spellings of a linear layer and of activation functions -> the Op `linear` and torch's own activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, arguments, insert, rewrite_nodes, same, value

aten = torch.ops.aten


def raise_linear(graph_module: fx.GraphModule) -> Outcome:
    """`linear(x, weight, bias)`, as nn.Linear and F.linear leave it."""
    return rewrite_nodes(graph_module, aten.linear.default, lambda x, weight, bias=None: ops.linear(x, weight, bias))


def raise_conv1d(graph_module: fx.GraphModule) -> Outcome:
    """view(addmm(bias, view(x, [-1, K]), W), [..., N]), as Hugging Face's Conv1D leaves it: the weight is stored (K,
    N), which the Op sees as a transposed view."""
    count, refused = 0, []
    for node in [node for node in graph_module.graph.nodes if node.target is aten.addmm.default]:
        args = arguments(node)
        bias, flat, weight = args["self"], args["mat1"], args["mat2"]
        if args["beta"] != 1 or args["alpha"] != 1:
            refused.append(f"{node.name}: alpha or beta is not 1")
            continue
        unflattened = next(iter(node.users)) if len(node.users) == 1 else None
        if _keeps_last_dim(flat) and unflattened is not None and _keeps_last_dim(unflattened):
            x, result = flat.args[0], unflattened
            if not same(value(x).shape[:-1], value(result).shape[:-1]):
                x, result = flat, node
        else:
            x, result = flat, node
        if reason := insert(graph_module, [result], _linear_transposed, x, weight, bias):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _linear_transposed(x: Any, weight: Any, bias: Any) -> Any:
    return ops.linear(x, aten.t.default(weight), bias)


def _keeps_last_dim(node: Any) -> bool:
    """Whether this is a view that only merges or splits the leading dims."""
    if not isinstance(node, fx.Node) or node.target not in (aten.view.default, aten.reshape.default):
        return False
    return same(value(node.args[0]).shape[-1], value(node).shape[-1])


def gelu_tanh_written_out(x: Tensor) -> Tensor:
    """Hugging Face's NewGELUActivation (GPT-2)."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_erf_written_out(x: Tensor) -> Tensor:
    """As in Google's BERT and in many notebooks."""
    return x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951))


def _activation_examples(dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.randn(2, 8, dtype=dtype),)


LINEAR: list[Rewrite | GraphPass] = [
    GraphPass("linear: nn.Linear", raise_linear),
    GraphPass("linear: Conv1D", raise_conv1d),
    Rewrite(
        "gelu_tanh: written out",
        gelu_tanh_written_out,
        lambda x: aten.gelu.default(x, approximate="tanh"),
        _activation_examples,
        (aten.tanh.default, aten.pow.Tensor_Scalar),
    ),
    Rewrite(
        "gelu: written out",
        gelu_erf_written_out,
        lambda x: aten.gelu.default(x),
        _activation_examples,
        aten.erf.default,
    ),
]
