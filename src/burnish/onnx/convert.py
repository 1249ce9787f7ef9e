"""A Program as an ONNX model: one run of torch's own exporter for the graph and for what its Ops compute.

What is exported is a module that computes two things: the Program's graph, in which each Op call is one symbolic node,
and beside it the body of each Op, on inputs of its own. Of the ONNX graph that comes out the bodies are cut out again:
they are the functions that the symbolic nodes call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize_ir
from torch import Tensor, fx, nn
from torch.onnx.ops import symbolic_multi_out

from burnish._quiet import quiet
from burnish.capture import InputSpec, Program
from burnish.onnx.bodies import body_of
from burnish.onnx.calls import Call, Signature, calls_of
from burnish.onnx.domain import DOMAIN, VERSION
from burnish.onnx.errors import OnnxError
from burnish.onnx.functions import KNOWN, attribute, cut_out, with_overloads
from burnish.onnx.weights import is_layout_of_weights, store_as_read
from burnish.op import OPS

aten = torch.ops.aten
_TALKATIVE = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Converted:
    """A model, and the calls of functions in it with the Op calls that they stand for, in the graph's order."""

    model: ir.Model
    calls: list[tuple[Call, ir.Node]]

    def body(self, node: ir.Node) -> ir.Function:
        """The function that a node calls."""
        return self.model.functions[node.op_identifier()]


def convert(program: Program, leaves: Sequence[Any], opset: int, prefix: str = "") -> Converted:
    """The Program's graph in standard operators and calls of functions in the domain "burnish".

    leaves: flat inputs that the Program serves, sizes that are free in it above 1.
    prefix: what is left out of weights' and modules' names that begin with it.
    """
    calls = calls_of(program.graph_module.graph, prefix)
    wanted = list(dict.fromkeys(call.signature for call in calls))
    new = [signature for signature in wanted if (signature, opset) not in KNOWN]
    with torch.no_grad(), quiet(*_TALKATIVE):
        model = _exported(_GraphAndBodies(program, calls, new, opset), leaves, program, new, opset)
        # What `optimize=True` does, but for the rotations that it finds at opset 23: their tables serve one batch size.
        optimize_ir(model, should_fold=lambda node: False if is_layout_of_weights(node) else None)
    _cut_bodies_out(model.graph, program, new, opset)
    store_as_read(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)  # it has paths of this machine
    for weight in list(model.graph.initializers.values()):
        weight.name = str(weight.name).removeprefix(prefix)
    functions = with_overloads([KNOWN[signature, opset] for signature in wanted])
    model.functions.update({function.identifier(): function for function in functions})
    by_signature = dict(zip(wanted, functions, strict=True))
    placed = [(calls[int(node.op_type)], node) for node in model.graph if node.domain == DOMAIN]
    for call, node in placed:
        _call_function(node, call, by_signature[call.signature])
    return Converted(model, placed)


def _exported(
    module: nn.Module, leaves: Sequence[Any], program: Program, signatures: Sequence[Signature], opset: int
) -> ir.Model:
    examples = (tensor for signature in signatures for tensor in signature.examples())
    free = (dims for signature in signatures for dims in signature.free())
    try:
        exported = torch.export.export(
            module,
            (*leaves, *examples),
            dynamic_shapes=((*map(_free, program.inputs), *free),),
            strict=False,
        )
        onnx_program = torch.onnx.export(exported, opset_version=opset, optimize=False, verbose=False)
    except OnnxError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().split(" Failure message")[0].partition("\n")[0]
        raise OnnxError(f"torch's exporter has no form for a part of it: {reason}") from error
    assert onnx_program is not None
    return onnx_program.model


def _free(spec: InputSpec) -> dict[int, Any] | None:
    if not spec.is_tensor:
        return None
    return {dim: torch.export.Dim.AUTO for dim, size in enumerate(spec.sizes) if isinstance(size, str)}


class _GraphAndBodies(nn.Module):
    def __init__(self, program: Program, calls: Sequence[Call], signatures: Sequence[Signature], opset: int) -> None:
        super().__init__()
        graph_module = program.graph_module
        # The same dictionaries, so that weights keep their names.
        self._parameters, self._buffers = graph_module._parameters, graph_module._buffers
        self._modules = graph_module._modules
        self._run = _SymbolicCalls(self, graph_module.graph, calls).run
        self._inputs, self._signatures, self._opset = len(program.inputs), signatures, opset

    def forward(self, *inputs: Any) -> Any:
        """The graph's inputs, then each body's."""
        tensors = iter(inputs[self._inputs :])
        bodies = [self._body(signature, tensors) for signature in self._signatures]
        outputs = self._run(*inputs[: self._inputs])
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)], bodies

    def _body(self, signature: Signature, tensors: Iterator[Tensor]) -> tuple[Tensor, ...]:
        given = dict(signature.settings) | {name: next(tensors) for name, *_ in signature.tensors}
        parameters = OPS[signature.op].signature.parameters
        try:
            results = body_of(signature, self._opset)(*map(given.get, parameters))
        except Exception as error:
            sizes = ", ".join(f"{name} ({', '.join(map(str, sizes))})" for name, _, sizes in signature.tensors)
            raise OnnxError(f"{signature.op} cannot be written for {sizes}: {error}") from error
        return (results if isinstance(results, tuple) else (results,))[: signature.results]


class _SymbolicCalls(fx.Interpreter):
    """Runs a graph, each Op call as a symbolic node whose type is its number."""

    def __init__(self, module: nn.Module, graph: fx.Graph, calls: Sequence[Call]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self._numbered = {call.node: (number, call) for number, call in enumerate(calls)}

    def run_node(self, node: fx.Node) -> Any:
        if node not in self._numbered:
            return super().run_node(node)
        number, call = self._numbered[node]
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        bound = call.op.bind(*args, **kwargs)
        value = call.op.shape(*bound)
        results = value if isinstance(value, tuple) else (value,)
        kept = results[: call.signature.results]
        made = symbolic_multi_out(
            f"{DOMAIN}::{number}",
            [argument for argument in bound if isinstance(argument, Tensor)],
            dtypes=[result.dtype for result in kept],
            shapes=[result.shape for result in kept],
            version=VERSION,
        )
        return (*made, *results[len(kept) :]) if isinstance(value, tuple) else made[0]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # A symbolic node's result is contiguous, however the Op lays out its own: views of that may need a copy here.
        return super().call_function(aten.reshape.default if target is aten.view.default else target, args, kwargs)


def _cut_bodies_out(graph: ir.Graph, program: Program, signatures: Sequence[Signature], opset: int) -> None:
    """Moves the bodies, whose inputs and outputs come after the Program's own, out of the graph."""
    inputs = graph.inputs[sum(spec.is_tensor for spec in program.inputs) :]
    outputs = graph.outputs[len(graph.outputs) - sum(signature.results for signature in signatures) :]
    del graph.inputs[len(graph.inputs) - len(inputs) :]
    ins, outs = iter(inputs), iter(outputs)
    for signature in signatures:
        own = [next(ins) for _ in signature.tensors]
        made = [next(outs) for _ in range(signature.results)]
        KNOWN[signature, opset] = cut_out(graph, own, made, signature, opset)
    del graph.outputs[len(graph.outputs) - len(outputs) :]


def _call_function(node: ir.Node, call: Call, function: ir.Function) -> None:
    """Makes a symbolic node the call of a function, with the Op's settings as attributes."""
    node.op_type, node.overload = function.name, function.overload
    node.name = f"{call.module}/{call.node.name.replace('_default', '')}"
    for name, value in call.signature.settings:
        node.attributes[name] = attribute(name, value)
