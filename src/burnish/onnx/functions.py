"""ONNX functions, one for each signature of an Op, made of bodies that torch's exporter wrote into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import onnx_ir as ir

from burnish.onnx.calls import Signature
from burnish.onnx.domain import DOMAIN
from burnish.op import OPS

KNOWN: dict[tuple[Signature, int], ir.Function] = {}
"""The functions that this process has made, by signature and opset: torch's exporter takes seconds for a model's."""


def cut_out(
    graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], signature: Signature, opset: int
) -> ir.Function:
    """The function that computes `outputs` from `inputs`, as a part of `graph` does."""
    body = ir.convenience.extract(graph, inputs, outputs)
    body.insert_before(next(iter(body)), [_constant(value) for value in body.initializers.values()])
    body.initializers.clear()
    body.opset_imports.clear()
    body.opset_imports[""] = opset
    settings = [ir.Attr(name, attribute(name, value).type, None) for name, value in signature.settings]
    function = ir.Function(DOMAIN, signature.op, graph=body, attributes=settings)
    _name_values(function, [name for name, *_ in signature.tensors])
    function.doc_string = (OPS[signature.op].__doc__ or "").split("\n")[0]
    return function


def attribute(name: str, value: Any) -> ir.Attr:
    """A setting of an Op as a node's attribute, for whoever reads the graph: the bodies have no use for it."""
    if isinstance(value, bool):
        return ir.AttrInt64(name, int(value))
    return ir.convenience.convert_attribute(name, value if isinstance(value, (int, float, str, tuple)) else str(value))


def _constant(value: ir.Value) -> ir.Node:
    """A node that stands for an initializer: a function has none."""
    node = ir.Node("", "Constant", [], [ir.Attr("value", ir.AttributeType.TENSOR, value.const_value)], num_outputs=1)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    return node


def _name_values(function: ir.Function, inputs: Sequence[str]) -> None:
    """The Op's names for what goes in, and counted ones for the rest, so that equal bodies read alike; without shapes,
    which are one call's."""
    numbers = count()
    for value, name in zip(function.inputs, inputs, strict=True):
        value.name, value.type, value.shape = name, None, None
    for node in function:
        node.name, node.doc_string = None, None
        node.metadata_props.clear()
        for value in node.outputs:
            value.name, value.type, value.shape = f"{node.op_type.lower()}_{next(numbers)}", None, None
            value.metadata_props.clear()
    for number, value in enumerate(function.outputs):
        value.name = f"result_{number}" if len(function.outputs) > 1 else "result"


def with_overloads(functions: Sequence[ir.Function]) -> list[ir.Function]:
    """Copies of these in a model of their own: equal ones are one, others of one name are told apart by overload."""
    overloads: dict[str, dict[bytes, ir.Function]] = {}
    placed = []
    for function in functions:
        known = overloads.setdefault(function.name, {})
        content = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
        if content not in known:
            known[content] = function.clone()
            known[content].overload = str(len(known)) if len(known) > 1 else ""
        placed.append(known[content])
    return placed
