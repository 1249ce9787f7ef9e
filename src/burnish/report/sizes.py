"""What the nodes of a graph do at the sizes of one call, found out on real tensors or on fake ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from burnish.report.costs import Work, work_of
from burnish.report.walk import Visit, Walk

aten = torch.ops.aten


def noting(work: dict[fx.Node, Work]) -> Visit:
    """Runs each node and notes its work; of those that compute no tensors, and of parts of a tuple, none."""

    def visit(node: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if node.target is not operator.getitem and any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            work[node] = work_of(node.target, args, kwargs, result)
        return result

    return visit


def work_in_calls(
    graph_module: fx.GraphModule, leaves: Sequence[Any], device: torch.device | None = None
) -> dict[fx.Node, Work]:
    """`work_on_fakes` of a rewritten graph, without what is done once for all calls: weights are packed together."""
    packed = [node for node in graph_module.graph.nodes if node.target is aten.cat.default and _of_weights(node)]
    work = work_on_fakes(graph_module, leaves, device)
    for node in (part for cat in packed for part in (cat, *cat.all_input_nodes)):
        work.pop(node, None)
    return work


def _of_weights(cat: fx.Node) -> bool:
    return all(part.op == "get_attr" or part.target is aten.new_zeros.default for part in cat.all_input_nodes)


def work_on_fakes(
    graph_module: fx.GraphModule, leaves: Sequence[Any], device: torch.device | None = None
) -> dict[fx.Node, Work]:
    """The work of every node, without computing anything: sizes, strides and dtypes are all that is followed.

    Args:
        device: where to imagine all tensors; where they are, unless given.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        where = device or leaf.device
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=where)

    weights: dict[int, Any] = {}

    def weight(tensor: Tensor) -> Any:
        if id(tensor) not in weights:
            weights[id(tensor)] = fake(tensor)
        return weights[id(tensor)]

    work: dict[fx.Node, Work] = {}
    with torch.no_grad(), mode:
        Walk(graph_module, weight=weight)([fake(leaf) for leaf in leaves], noting(work))
    return work
