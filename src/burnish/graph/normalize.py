"""One spelling for every call: `F.relu(x)`, `x.relu()`, `nn.ReLU()(x)` and `aten.relu(x)` become the same `Call`.

Names follow ATen's operator schemas. Arguments are bound to parameter names with defaults filled in, so that position,
keyword and omitted default compare alike. What has no ATen counterpart keeps its own name.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from burnish.graph._words import words

COMMUTATIVE = words("add mul bitwise_and bitwise_or bitwise_xor logical_and logical_or eq ne maximum minimum")
# Integer lists that say how large something is; in a pattern traced from example inputs they hold the example's sizes.
SHAPE_ARGUMENTS = words("size shape repeats normalized_shape sizes split_size")
DIM_ARGUMENTS = words("dim dims dim0 dim1 start_dim end_dim")
INT64_MAX = 2**63 - 1

_OPERATORS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add_", operator.sub: "sub", operator.mul: "mul", operator.imul: "mul_",
    operator.truediv: "div", operator.floordiv: "floor_divide", operator.mod: "remainder", operator.matmul: "matmul",
    operator.pow: "pow", operator.neg: "neg", operator.pos: "positive", operator.abs: "abs",
    operator.invert: "bitwise_not", operator.and_: "bitwise_and", operator.or_: "bitwise_or",
    operator.xor: "bitwise_xor", operator.eq: "eq", operator.ne: "ne", operator.lt: "lt", operator.le: "le",
    operator.gt: "gt", operator.ge: "ge",
}  # fmt: skip
_SYNONYMS = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "multiply": "mul", "subtract": "sub",
    "divide": "div", "true_divide": "div", "absolute": "abs", "negative": "neg", "swapaxes": "transpose",
    "swapdims": "transpose", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne", "concat": "cat", "concatenate": "cat",
}  # fmt: skip
_ARGUMENT_SYNONYMS = {"input": "self", "training": "train", "axis": "dim", "keepdims": "keepdim"}
_IGNORED_ARGUMENTS = frozenset({"_stacklevel", "cudnn_enable", "non_blocking"})
_MEMORY_FORMATS = {
    0: torch.contiguous_format,
    1: torch.preserve_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
}

# Modules without state, as the function they call and the attributes that they pass to it.
_FUNCTIONAL_MODULES: dict[type[nn.Module], tuple[Callable[..., Any], dict[str, str]]] = {
    nn.ReLU: (F.relu, {"inplace": "inplace"}),
    nn.ReLU6: (F.relu6, {"inplace": "inplace"}),
    nn.LeakyReLU: (F.leaky_relu, {"negative_slope": "negative_slope", "inplace": "inplace"}),
    nn.ELU: (F.elu, {"alpha": "alpha", "inplace": "inplace"}),
    nn.GELU: (F.gelu, {"approximate": "approximate"}),
    nn.SiLU: (F.silu, {"inplace": "inplace"}),
    nn.Mish: (F.mish, {"inplace": "inplace"}),
    nn.Hardswish: (F.hardswish, {"inplace": "inplace"}),
    nn.Sigmoid: (torch.sigmoid, {}),
    nn.Tanh: (torch.tanh, {}),
    nn.Softmax: (F.softmax, {"dim": "dim"}),
    nn.LogSoftmax: (F.log_softmax, {"dim": "dim"}),
    nn.Dropout: (F.dropout, {"p": "p", "training": "training", "inplace": "inplace"}),
    nn.Flatten: (torch.flatten, {"start_dim": "start_dim", "end_dim": "end_dim"}),
}


@dataclass(frozen=True)
class Call:
    """A node in its one spelling: `key` is the operation, `args` its arguments by name, defaults included."""

    key: Hashable
    args: dict[str, Any]

    def __str__(self) -> str:
        return describe_key(self.key)


def describe_key(key: Hashable) -> str:
    """A key as a reader would name the operation."""
    return key if isinstance(key, str) else str(getattr(key, "__name__", key))


# --- the operation alone: cheap, computed for every node of a graph ---------------------------------------------------


@functools.cache
def _overload_key(overload: Any) -> str:
    namespace, _, name = overload._schema.name.partition("::")
    if namespace != "aten":
        return f"{namespace}::{name}"
    return "sub" if name == "rsub" else _SYNONYMS.get(name, name)


def _is_torch_function(function: Callable[..., Any]) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module == "torch" or module.startswith("torch.") or inspect.ismethoddescriptor(function)


@functools.cache
def _function_key(function: Any) -> Hashable:
    if isinstance(function, torch._ops.OpOverload):
        return _overload_key(function)
    if isinstance(function, torch._ops.OpOverloadPacket):
        return _overload_key(getattr(function, function.overloads()[0]))
    if function in _OPERATORS:
        return _OPERATORS[function]
    if function is operator.getitem:
        return "getitem"
    if function is builtins.getattr:
        return "getattr"
    name = getattr(function, "__name__", None)
    if name is None or not _is_torch_function(function):
        own: Hashable = function
        return own
    return "sub" if name == "rsub" else _SYNONYMS.get(name, name)


def is_symbolic_value(node: fx.Node) -> bool:
    """Whether the node's value is known to be a size or other symbolic number, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def operation_key(node: fx.Node, gm: fx.GraphModule) -> Hashable:
    """The operation that a node performs, without looking at its arguments. Nodes that match have equal keys."""
    if node.op == "call_function":
        key = _function_key(node.target)
        if key == "getattr" and len(node.args) > 1 and node.args[1] == "shape":
            return "size"
        # Arithmetic on sizes is spelled like arithmetic on tensors, but a tensor pattern must not match it.
        return ("sym", key) if is_symbolic_value(node) and isinstance(key, str) else key
    if node.op == "call_method":
        return _SYNONYMS.get(str(node.target), str(node.target))
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        entry = _FUNCTIONAL_MODULES.get(type(module))
        if entry is not None and not _has_hooks(module):
            return _function_key(entry[0])
        kind: Any = type(module)
        return kind
    return node.op


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --- the whole call ---------------------------------------------------------------------------------------------------


def canonical(node: fx.Node, gm: fx.GraphModule) -> Call:
    """The node's operation and arguments in their one spelling.

    `gm` resolves `call_module` targets. Never raises: a call that fits no known signature keeps positional names.
    """
    key = operation_key(node, gm)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(key, type):
            return Call(key, _bind_signature(module.forward, node.args, node.kwargs))
        function, attributes = _FUNCTIONAL_MODULES[type(module)]
        settings = {argument: getattr(module, attribute) for argument, attribute in attributes.items()}
        return _function_call(key, function, node.args, {**node.kwargs, **settings})
    if node.op == "call_function":
        call = _function_call(key, node.target, node.args, node.kwargs)
    elif node.op == "call_method":
        call = _schema_call(key, str(node.target), node.args, node.kwargs)
    else:
        return Call(key, {})
    return call


def _function_call(key: Hashable, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if isinstance(target, torch._ops.OpOverload):
        bound = _bind_arguments(_overload_arguments(target), args, kwargs)
        return _finish(key, _overload_name(target), bound if bound is not None else _raw(args, kwargs))
    if isinstance(target, torch._ops.OpOverloadPacket):
        for overload in (getattr(target, name) for name in target.overloads()):
            if (bound := _bind_arguments(_overload_arguments(overload), args, kwargs)) is not None:
                return _finish(key, _overload_name(overload), bound)
        return Call(key, _raw(args, kwargs))
    if key == "size" and target is builtins.getattr:
        return Call("size", {"self": args[0]})
    if key == "getattr":
        return Call("getattr", {"self": args[0], "name": args[1]})
    if key == "getitem":
        return Call("getitem", {"self": args[0], "index": _plain_slices(args[1])})
    name = getattr(target, "__name__", "")
    if target in _OPERATORS:
        return _schema_call(key, _OPERATORS[target], args, kwargs)
    if not isinstance(key, str) and not isinstance(key, tuple):
        return Call(key, _bind_signature(target, args, kwargs))
    if inspect.isfunction(target):
        bound = _bind_signature(target, args, kwargs)
        call = _finish(key, name, bound)
        # F.embedding(input, weight) is not aten.embedding(weight, indices): only equal parameter lists share a name.
        same = any(call.args.keys() == _parameter_names(schema) for schema in _schemas(str(call.key)))
        return call if same else Call(f"{target.__module__}.{name}", bound)
    return _schema_call(key, name, args, kwargs)


def _raw(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


@functools.cache
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without a readable signature
        return None


def _bind_signature(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    # A bound method hashes by its instance; caching on the function keeps the cache as small as the set of classes.
    bound_method = inspect.ismethod(function)
    signature = _signature(function.__func__ if bound_method else function)
    if signature is None:
        return _raw(args, kwargs)
    try:
        bound = signature.bind(*((None, *args) if bound_method else args), **kwargs)
    except TypeError:
        return _raw(args, kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if bound_method:
        arguments.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


# --- binding to ATen schemas ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Argument:
    name: str
    type: str
    default: Any
    required: bool
    kwarg_only: bool


def _read_arguments(schema: Any) -> tuple[_Argument, ...]:
    return tuple(
        _Argument(
            _ARGUMENT_SYNONYMS.get(a.name, a.name), str(a.real_type if hasattr(a, "real_type") else a.type),
            a.default_value, not a.has_default_value(), a.kwarg_only,
        )
        for a in schema.arguments
    )  # fmt: skip


@functools.cache
def _overload_arguments(overload: Any) -> tuple[_Argument, ...]:
    return _read_arguments(overload._schema)


@functools.cache
def _overload_name(overload: Any) -> str:
    return str(overload._schema.name.rpartition("::")[2])


@functools.cache
def _schemas(name: str) -> tuple[tuple[_Argument, ...], ...]:
    """The argument lists of the ATen overloads called `name` that take a tensor first and write to no `out`."""
    found = []
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        arguments = _read_arguments(schema)
        if not arguments or schema.overload_name.startswith("prim_") or any(a.name == "out" for a in arguments):
            continue
        takes_tensor = any("Tensor" in a.type for a in arguments[:2])
        if takes_tensor and not any("Dimname" in a.type for a in arguments):
            found.append(arguments)
    return tuple(found)


def _parameter_names(schema: tuple[_Argument, ...]) -> set[str]:
    return {a.name for a in schema} - _IGNORED_ARGUMENTS


def _bind_arguments(
    schema: tuple[_Argument, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The call's arguments by the schema's names, or None where the call does not fit the schema."""
    positional = [a for a in schema if not a.kwarg_only]
    if len(args) > len(positional):
        args = _pack_varargs(positional, args)
        if len(args) > len(positional):
            return None
    given = {_ARGUMENT_SYNONYMS.get(name, name): value for name, value in kwargs.items()}
    bound: dict[str, Any] = {}
    for i, argument in enumerate(positional):
        if i < len(args):
            bound[argument.name] = args[i]
    for argument in schema:
        if argument.name in given:
            if argument.name in bound:
                return None
            bound[argument.name] = given.pop(argument.name)
        elif argument.name not in bound:
            if argument.required:
                return None
            bound[argument.name] = argument.default
    if given:
        return None
    for argument in schema:
        bound[argument.name] = _coerce(argument, bound[argument.name])
    return {argument.name: bound[argument.name] for argument in schema}


def _pack_varargs(positional: list[_Argument], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.permute(0, 2, 1)` -> `x.permute([0, 2, 1])`, where the schema has one integer list there."""
    last = len(positional) - 1
    if last >= 0 and _is_int_list(positional[last].type):
        return (*args[:last], list(args[last:]))
    return args


def _is_int_list(kind: str) -> bool:
    return kind.replace("SymInt", "int").startswith(("List[int]", "int[", "Optional[List[int]"))


def _coerce(argument: _Argument, value: Any) -> Any:
    if argument.name == "memory_format" and isinstance(value, int):
        return _MEMORY_FORMATS[value]
    if _is_int_list(argument.type) and isinstance(value, int):
        return [value]
    if argument.type in ("float", "Optional[float]") and type(value) is int:
        return float(value)
    return value


def _fit(schema: tuple[_Argument, ...], bound: dict[str, Any]) -> int:
    """How well values suit a schema's types: -1 for not at all, else more is better."""
    score = 0
    for argument in schema:
        value, kind = bound[argument.name], argument.type
        if isinstance(value, fx.Node):
            score += 2 if kind.startswith("Tensor") else 1
        elif value is None or (not argument.required and value == argument.default):
            score += 1
        elif isinstance(value, (list, tuple)):
            if "List" not in kind and "[" not in kind:
                return -1
            score += 2
        elif isinstance(value, str):
            if "str" not in kind:
                return -1
        elif isinstance(value, bool):
            if kind not in ("bool", "Scalar", "number", "Tensor", "Optional[bool]", "Optional[number]"):
                return -1
        elif isinstance(value, (int, float, complex)):
            if "List" in kind or "str" in kind or kind.startswith("bool"):
                return -1
            score += 2 if "Tensor" not in kind else 1
    return score


def _schema_call(key: Hashable, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    name = _SYNONYMS.get(name, name)
    best: dict[str, Any] | None = None
    best_score = -1
    for schema in _schemas(name):
        bound = _bind_arguments(schema, args, kwargs)
        if bound is not None and (score := _fit(schema, bound)) > best_score:
            best, best_score = bound, score
    return _finish(key, name, best if best is not None else _raw(args, kwargs))


def _finish(key: Hashable, name: str, args: dict[str, Any]) -> Call:
    """The few spellings that names and defaults alone do not unify."""
    renamed = {_ARGUMENT_SYNONYMS.get(n, n): v for n, v in args.items() if n not in _IGNORED_ARGUMENTS}
    if "inplace" in renamed and not isinstance(renamed["inplace"], fx.Node) and renamed.pop("inplace"):
        key = f"{key}_"
    if name == "rsub":
        renamed["self"], renamed["other"] = renamed["other"], renamed["self"]
    if renamed.get("rounding_mode", "") is None:
        del renamed["rounding_mode"]
    if name == "slice":
        renamed["start"] = renamed["start"] if renamed["start"] is not None else 0
        renamed["end"] = renamed["end"] if renamed["end"] is not None else INT64_MAX
    return Call(key, renamed)


def _plain_slices(index: Any) -> Any:
    """`x[0:n:1]` -> `x[:n]`: bounds that change nothing become None."""
    if isinstance(index, (tuple, list)):
        return type(index)(_plain_slices(i) for i in index)
    if isinstance(index, slice):
        step = None if index.step == 1 else index.step
        return slice(
            None if index.start == 0 and step is None else index.start,
            None if index.stop == INT64_MAX else index.stop,
            step,
        )
    return index
