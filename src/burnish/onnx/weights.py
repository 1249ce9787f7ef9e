"""Weights as the graph wants them: what is only ever joined or transposed is stored so, and computed when it is
written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_LAYOUT = ("Concat", "Transpose")


def is_layout_of_weights(node: ir.Node) -> bool:
    """Whether the node joins or transposes weights and nothing else."""
    return node.op_type in _LAYOUT and node.domain == "" and all(map(_is_weight, node.inputs))


def store_as_read(graph: ir.Graph) -> None:
    """Puts one weight in the place of each node that joins or transposes weights."""
    for node in list(graph):
        if not is_layout_of_weights(node):
            continue
        old, parts = node.outputs[0], [value for value in node.inputs if value is not None]
        weight = ir.Value(name=_name(node, parts), shape=old.shape, type=old.type)
        assert weight.dtype is not None
        assert weight.shape is not None
        weight.const_value = ir.LazyTensor(_computed(node, parts), weight.dtype, weight.shape, name=weight.name)
        graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(old, weight)
        graph.remove(node, safe=True)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _computed(node: ir.Node, parts: Sequence[ir.Value]) -> Callable[[], ir.TensorProtocol]:
    tensors = [part.const_value for part in parts]

    def compute() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        if node.op_type == "Concat":
            made = np.concatenate(arrays, axis=node.attributes.get_int("axis"))
        else:
            made = np.ascontiguousarray(arrays[0].transpose(_permutation(node, arrays[0].ndim)))
        return ir.Tensor(made, dtype=tensors[0].dtype)  # type: ignore[union-attr]

    return compute


def _permutation(node: ir.Node, rank: int) -> Sequence[Any]:
    return node.attributes.get_ints("perm") or range(rank)[::-1]


def _name(node: ir.Node, parts: Sequence[ir.Value]) -> str:
    """Of weights that differ in one place "self.query+key+value.weight", of a transposed one "weight.T"."""
    names = [str(part.name) for part in parts]
    if node.op_type == "Transpose":
        return f"{names[0]}.T"
    words = [name.split(".") for name in names]
    alike = len({len(each) for each in words}) == 1
    differing = [i for i, each in enumerate(zip(*words, strict=False)) if len(set(each)) > 1]
    if not alike or len(differing) != 1:
        return "+".join(names)
    words[0][differing[0]] = "+".join(each[differing[0]] for each in words)
    return ".".join(words[0])
