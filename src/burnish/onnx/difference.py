"""Where a file that computes something else begins to do so: the first Op call whose results differ."""

from __future__ import annotations

import copy
import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from burnish.numerics import check
from burnish.onnx.running import open_session, run
from burnish.verify import outputs_in_float64

if TYPE_CHECKING:
    from burnish.capture import Program
    from burnish.onnx.convert import Converted


def first_difference(converted: Converted, program: Program, leaves: Sequence[Any]) -> str | None:
    """The Op and the module of the first call of which ONNX Runtime's results differ from PyTorch's, in words; None
    where none does."""
    if not converted.calls:
        return None
    found = _onnx_results(converted, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    graph_module = _returning_results(program, converted)
    with torch.no_grad():
        eager = graph_module(*leaves)
    true = outputs_in_float64(graph_module, leaves)
    owners = [call for call, node in converted.calls for _ in node.outputs]
    for call, *values in zip(owners, found, eager, true, strict=True):
        if not check(*values).ok:
            return f"{call.op.name} of {call.module}" if call.module else call.op.name
    return None


def _onnx_results(converted: Converted, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of all calls, by ONNX Runtime."""
    outputs = converted.model.graph.outputs
    own = list(outputs)
    outputs[:] = [value for _, node in converted.calls for value in node.outputs]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            ir.save(converted.model, path, external_data="weights")
            return run(open_session(path), inputs)
    finally:
        outputs[:] = own


def _returning_results(program: Program, converted: Converted) -> fx.GraphModule:
    """The Program's graph that returns them."""
    graph = copy.deepcopy(program.graph_module.graph)
    nodes = {node.name: node for node in graph.nodes}
    results = []
    with graph.inserting_before(graph.output_node()):
        for call, node in converted.calls:
            if isinstance(call.node.meta["val"], tuple):
                each = [
                    graph.call_function(operator.getitem, (nodes[call.node.name], i)) for i in range(len(node.outputs))
                ]
            else:
                each = [nodes[call.node.name]]
            results += each
    graph.output_node().args = (tuple(results),)
    return fx.GraphModule(program.graph_module, graph)
