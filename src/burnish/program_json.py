"""A captured `Program` as JSON data, and back: the graph with its sizes, module paths and source lines; weights by
name."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils import _pytree as pytree

from burnish.capture import InputSpec, Program, copy_graph
from burnish.graph.autocast import autocast_dtypes
from burnish.graph_json import (
    NotData,
    Sizes,
    decode,
    encode,
    encode_expression,
    encode_layout,
    encode_size,
    function_name,
    function_named,
    identifier,
    torch_constant,
)
from burnish.places import find_weight
from burnish.record import StepRecord

_CONSTANT_BYTES = 1 << 16  # of the constants that a model's code makes: a table of this size is a weight in disguise
_LISTS = {"list": list, "tuple": tuple}


# --- Program -> data ------------------------------------------------------------------------------


def program_to_data(program: Program, model: nn.Module, elsewhere: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The Program as it was captured, before any step.

    Args:
        elsewhere: addresses of tensors that the model holds outside its parameters and buffers. They may change without
            the graph's knowledge, so they are no constants.

    Raises:
        NotData: the Program has something that this format has no place for.
    """
    return _Encoder(program, model, elsewhere).data()


class _Encoder:
    def __init__(self, program: Program, model: nn.Module, elsewhere: frozenset[int]) -> None:
        self.program, self.model, self.elsewhere = program, model, elsewhere
        env = next(
            (node.meta["val"].fake_mode.shape_env for node in program.graph_module.graph.nodes if _is_fake(node)), None
        )
        names = {size for spec in program.inputs for size in spec.sizes if isinstance(size, str)}
        ranges = {} if env is None else {str(symbol): bounds for symbol, bounds in env.var_to_range.items()}
        self.symbols = {name: _bounds(ranges[name]) for name in sorted(names)}
        self.known = frozenset(names)
        facts = [] if env is None else sorted((env.replace(fact) for fact in env.divisible), key=str)
        self.divisible = [encode_expression(fact, self.known) for fact in facts if fact.free_symbols]
        if env is not None and env.deferred_runtime_asserts:
            raise NotData("sizes that depend on values")
        self.tables: dict[str, dict[str, int]] = {"layouts": {}, "stacks": {}, "modules": {}}
        self.rows: dict[str, list[Any]] = {name: [] for name in self.tables}

    def data(self) -> dict[str, Any]:
        graph = self.program.graph_module.graph
        index = {node: position for position, node in enumerate(graph.nodes)}
        nodes = [self._node(node, index) for node in graph.nodes]
        (record,) = self.program.history
        return {
            "inputs": [_input_to_data(spec) for spec in self.program.inputs],
            "symbols": self.symbols,
            "divisible": self.divisible,
            "out_spec": _dumped(self.program.out_spec),
            "attention_interface": self.program.attention_interface,
            "record": {"nodes_before": record.nodes_before, "nodes_after": record.nodes_after, "notes": record.notes},
            "seconds": record.seconds,
            "weights": self._weights(graph),
            **self.rows,
            "nodes": nodes,
        }

    def _node(self, node: fx.Node, index: Mapping[fx.Node, int]) -> dict[str, Any]:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise NotData(f"a node of kind {node.op}")
        data: dict[str, Any] = {"op": node.op, "name": node.name}
        data["target"] = function_name(node.target) if node.op == "call_function" else str(node.target)
        data["args"] = [encode(arg, index) for arg in node.args]
        if node.kwargs:
            data["kwargs"] = {name: encode(arg, index) for name, arg in node.kwargs.items()}
        if "val" in node.meta:
            data["val"] = self._value(node.meta["val"])
        if stack := node.meta.get("stack_trace"):
            data["stack"] = self._row("stacks", stack)
        if modules := node.meta.get("nn_module_stack"):
            data["modules"] = self._row("modules", [[key, *map(str, entry)] for key, entry in modules.items()])
        return data

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._row("layouts", encode_layout(value, self.known))}
        if isinstance(value, torch.SymInt):
            return {"size": encode_size(value, self.known)}
        for name, kind in _LISTS.items():
            if type(value) is kind:
                return {name: [self._value(item) for item in value]}
        return encode(value, {})

    def _row(self, table: str, row: Any) -> int:
        """The place of `row` in a table without repetitions."""
        key = repr(row)
        if key not in self.tables[table]:
            self.tables[table][key] = len(self.rows[table])
            self.rows[table].append(row)
        return self.tables[table][key]

    def _weights(self, graph: fx.Graph) -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op != "get_attr" or node.target in weights:
                continue
            place = find_weight((self.program.graph_module,), node.target)
            tensor = place.owner[place.name]
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                raise NotData(f"the attribute {node.target}")
            own = _weight_of(self.model, node.target)
            weights[node.target] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "device": str(tensor.device),
            }
            if own is None or own.data_ptr() != tensor.data_ptr():
                weights[node.target]["bytes"] = self._constant(node.target, tensor)
        return weights

    def _constant(self, name: str, tensor: Tensor) -> str:
        if tensor.untyped_storage().data_ptr() in self.elsewhere:
            raise NotData(f"the tensor {name}, which the model keeps where burnish cannot name it")
        if tensor.numel() * tensor.element_size() > _CONSTANT_BYTES:
            raise NotData(f"the constant {name} of shape {tuple(tensor.shape)}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return base64.b64encode(bytes(flat.view(torch.uint8).tolist())).decode("ascii") if flat.numel() else ""


def _is_fake(node: fx.Node) -> bool:
    return getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None) is not None


def _bounds(bounds: Any) -> tuple[int, int | None]:
    low, high = bounds.lower, bounds.upper
    return int(low) if isinstance(low, sympy.Integer) else 0, int(high) if isinstance(high, sympy.Integer) else None


def _weight_of(model: nn.Module, path: str) -> Tensor | None:
    try:
        place = find_weight((model,), path)
    except KeyError:
        return None
    weight = place.owner[place.name]
    return weight if isinstance(weight, Tensor) else None


def _input_to_data(spec: InputSpec) -> dict[str, Any]:
    if not spec.is_tensor:
        return {"name": spec.name, "constant": encode(spec.constant, {})}
    return {
        "name": spec.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "device": str(spec.device),
        "sizes": list(spec.sizes),
        "limits": [list(limit) for limit in spec.limits],
    }


def _dumped(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
        again = pytree.treespec_loads(text)
    except Exception as error:  # whatever the registered type's own functions raise
        raise NotData(f"outputs of a structure that cannot be written: {error}") from error
    if again != spec:
        raise NotData("outputs of a structure that is not read as it was written")
    return text


# --- data -> Program ------------------------------------------------------------------------------


def inputs_of_data(data: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """What the Program in `data` serves; enough to say whether it is worth rebuilding."""
    return tuple(_input_from_data(spec) for spec in data["inputs"])


def _input_from_data(data: Mapping[str, Any]) -> InputSpec:
    if "constant" in data:
        return InputSpec(data["name"], constant=decode(data["constant"], ()))
    dtype, device = torch_constant("dtype", data["dtype"]), torch.device(data["device"])
    return InputSpec(data["name"], dtype, device, tuple(data["sizes"]), tuple((a, b) for a, b in data["limits"]))


def program_from_data(
    data: Mapping[str, Any], model: nn.Module, in_spec: pytree.TreeSpec, leaves: Sequence[Any]
) -> Program:
    """The Program again, on this model's weights, with the sizes of `leaves` as hints.

    Whatever `data` holds, nothing of it is run here: where it is not what `program_to_data` makes, the error may be of
    any type.
    """
    started = time.perf_counter()
    inputs = inputs_of_data(data)
    ranges = {name: (low, high) for name, (low, high) in data["symbols"].items()}
    graph = _Decoder(data, Sizes(ranges, _hints(inputs, leaves, ranges))).graph()
    weights = {path: _weight_from_data(path, entry, model) for path, entry in data["weights"].items()}
    root: Any = weights  # fx takes a dictionary of attributes by their paths
    graph_module = _make_graph_module(root, graph)
    captured = fx.GraphModule(root, copy_graph(graph))
    out_spec = pytree.treespec_loads(data["out_spec"])
    if out_spec.num_leaves != len(graph.output_node().args[0]):  # type: ignore[arg-type]
        raise NotData("the outputs do not fit their structure")
    program = Program(
        graph_module, captured, in_spec, out_spec, inputs, bool(data["attention_interface"]), autocast_dtypes()
    )
    record, before = data["record"], float(data["seconds"])
    program.history.append(
        StepRecord(
            "capture",
            nodes_before=int(record["nodes_before"]),
            nodes_after=int(record["nodes_after"]),
            seconds=time.perf_counter() - started,
            notes=[*map(str, record["notes"]), f"remembered from an earlier run, where it took {before:.2g} s"],
        )
    )
    return program


def _hints(inputs: Sequence[InputSpec], leaves: Sequence[Any], ranges: Mapping[str, Any]) -> dict[str, int]:
    """Each symbol's size in this call, as a capture would have widened it."""
    hints: dict[str, int] = {}
    for spec, leaf in zip(inputs, leaves, strict=True):
        for dim, size in enumerate(spec.sizes):
            if isinstance(size, str):
                hints.setdefault(size, max(leaf.shape[dim], ranges[size][0]))
    return hints


class _Decoder:
    def __init__(self, data: Mapping[str, Any], sizes: Sizes) -> None:
        self.source, self.sizes = data, sizes
        for expression in data["divisible"]:
            sizes.divisible(expression)
        self.modules = [{key: (path, cls) for key, path, cls in stack} for stack in data["modules"]]

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        nodes: list[fx.Node] = []
        for entry in self.source["nodes"]:
            op, name = entry["op"], identifier(entry["name"])
            args = tuple(decode(arg, nodes) for arg in entry["args"])
            kwargs = {identifier(key): decode(arg, nodes) for key, arg in entry.get("kwargs", {}).items()}
            node = graph.create_node(op, self._target(op, entry["target"]), args, kwargs, name)
            if node.name != name:
                raise NotData(f"the name {name} is taken")
            self._meta(node, entry)
            nodes.append(node)
        graph.lint()
        return graph

    def _target(self, op: str, target: str) -> Any:
        if op == "call_function":
            return function_named(target)
        if op in ("placeholder", "output"):
            return identifier(target)
        if op != "get_attr" or target not in self.source["weights"]:
            raise NotData(f"a node of kind {op} for {target}")
        return target

    def _meta(self, node: fx.Node, entry: Mapping[str, Any]) -> None:
        if "val" in entry:
            node.meta["val"] = self._value(entry["val"])
        if "stack" in entry:
            node.meta["stack_trace"] = str(self.source["stacks"][entry["stack"]])
        if "modules" in entry:
            node.meta["nn_module_stack"] = self.modules[entry["modules"]]
        node.meta["origin"] = node.name

    def _value(self, data: Any) -> Any:
        if isinstance(data, dict) and "tensor" in data:
            return self.sizes.tensor(data["tensor"], self.source["layouts"][data["tensor"]])
        if isinstance(data, dict) and "size" in data:
            return self.sizes.size(data["size"])
        for name, kind in _LISTS.items():
            if isinstance(data, dict) and name in data:
                return kind(self._value(item) for item in data[name])
        return decode(data, ())


def _weight_from_data(path: str, data: Mapping[str, Any], model: nn.Module) -> Tensor:
    """The model's own tensor of this name, or the constant."""
    dtype, shape, device = torch_constant("dtype", data["dtype"]), tuple(data["shape"]), torch.device(data["device"])
    if not all(part.replace("_", "a").isalnum() for part in path.split(".")):
        raise NotData(f"the name {path}")
    if "bytes" not in data:
        weight = _weight_of(model, path)
        if weight is None or (weight.dtype, tuple(weight.shape), weight.device) != (dtype, shape, device):
            raise NotData(f"the model has no {path} of {dtype} {shape} on {device}")
        return weight
    content = bytearray(base64.b64decode(data["bytes"], validate=True))
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise NotData(f"the constant {path} is not of {dtype} {shape}")
    if not content:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(content, dtype=torch.uint8).clone().view(dtype).reshape(shape).to(device)
