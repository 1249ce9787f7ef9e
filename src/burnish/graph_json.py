"""fx graphs as JSON data: nodes, arguments, and the symbolic sizes that `torch.export` found, without running an
operator.

Only data: functions are looked up in fixed tables or in torch's registry of `aten` and `burnish` operators, and
expressions are built from a fixed list of functions. What is not on the list is refused, in both directions.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._guards import SLoc
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
from torch.utils._sympy import functions as torch_functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges


class NotData(ValueError):
    """Something that this format has no place for (one line)."""


# --- functions ------------------------------------------------------------------------------------

_NAMESPACES = ("aten", "burnish")
_OPERATORS = "getitem add sub mul floordiv mod truediv neg pow eq ne lt le gt ge and_ or_ not_"
_PLAIN_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, _OPERATORS),
        (math, "trunc ceil floor"),
        (torch, "sym_max sym_min sym_not sym_int sym_float"),
    )
    for name in names.split()
}
_NAMES = {function: name for name, function in _PLAIN_FUNCTIONS.items()}


def function_name(function: Any) -> str:
    """The name under which `function_named` finds it."""
    if isinstance(function, torch._ops.OpOverload):
        name = str(function)
        if function_named(name) is function:
            return name
    elif (plain := _NAMES.get(function)) is not None:
        return plain
    raise NotData(f"a call of {function}")


def function_named(name: str) -> Callable[..., Any]:
    if name in _PLAIN_FUNCTIONS:
        return _PLAIN_FUNCTIONS[name]
    namespace, *rest = name.split(".")
    if namespace in _NAMESPACES and len(rest) == 2 and all(part.isidentifier() for part in rest):
        overload = getattr(getattr(getattr(torch.ops, namespace), rest[0], None), rest[1], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise NotData(f"the function {name}")


# --- arguments ------------------------------------------------------------------------------------

_TORCH_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode(value: Any, node_index: Mapping[fx.Node, int]) -> Any:
    """An argument of a node as JSON: scalars and lists as they are, anything else as an object of one entry."""
    if isinstance(value, fx.Node):
        return {"node": node_index[value]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _TORCH_CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(part, node_index) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return [encode(item, node_index) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(item, node_index) for item in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: encode(item, node_index) for key, item in value.items()}}
    raise NotData(f"an argument of type {type(value).__name__}")


def decode(data: Any, nodes: Sequence[fx.Node]) -> Any:
    """What `encode` made `data` of; `nodes` are those that stand before."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [decode(item, nodes) for item in data]
    if type(data) is not dict or len(data) != 1:
        raise NotData("an argument that is no object of one entry")
    ((kind, content),) = data.items()
    if kind == "node" and type(content) is int and 0 <= content < len(nodes):
        return nodes[content]
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in _TORCH_CONSTANTS:
        return torch_constant(kind, content)
    if kind == "slice":
        return slice(*(decode(part, nodes) for part in content))
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: decode(item, nodes) for key, item in content.items()}
    raise NotData(f"an argument of kind {kind}")


def torch_constant(kind: str, name: Any) -> Any:
    """`torch.<name>`, if it is a dtype, a layout or a memory format as `kind` says."""
    constant = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(constant, _TORCH_CONSTANTS[kind]):
        raise NotData(f"the {kind} {name}")
    return constant


def identifier(name: Any) -> str:
    """`name`, if it can stand in generated code as it is."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise NotData(f"the name {name!r}")
    return name


# --- sizes ----------------------------------------------------------------------------------------

_EXPRESSIONS: dict[str, Any] = {
    "+": sympy.Add,
    "*": sympy.Mul,
    "//": torch_functions.FloorDiv,
    "exactly//": torch_functions.CleanDiv,
    "%": torch_functions.Mod,
    "python%": torch_functions.PythonMod,
    "min": torch_functions.Min,
    "max": torch_functions.Max,
}
_EXPRESSION_NAMES = {kind: name for name, kind in _EXPRESSIONS.items()}
_SYMBOL = re.compile(r"s\d{1,6}")
_LARGEST_POWER = 8


def encode_size(size: Any, known: frozenset[str]) -> Any:
    """A size or stride as JSON: an int, a symbol's name, or a list of a function and what it is applied to."""
    return size if type(size) is int else encode_expression(size.node.expr, known)


def encode_expression(expression: Any, known: frozenset[str]) -> Any:
    """The same for a sympy expression."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        if expression.name not in known or not _SYMBOL.fullmatch(expression.name):
            raise NotData(f"the size {expression}, which no input has")
        return expression.name
    arguments = [encode_expression(argument, known) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        if not isinstance(arguments[1], int) or not 0 < arguments[1] <= _LARGEST_POWER:
            raise NotData(f"the size {expression}")
        return ["**", *arguments]
    if (name := _EXPRESSION_NAMES.get(type(expression))) is None:
        raise NotData(f"the size {expression}")
    return [name, *arguments]


def add_symbol(env: ShapeEnv, hint: int) -> torch.SymInt:
    """A new size of at least 2 in the sizes of a graph."""
    taken = {int(name[1:]) for name in map(str, env.var_to_range) if _SYMBOL.fullmatch(name)}
    name = f"s{max(taken, default=0) + 1}"
    return env.create_symintnode(_symbol(env, name, 2, None, hint), hint=hint)  # type: ignore[return-value]


def _symbol(env: ShapeEnv, name: str, low: int, high: int | None, hint: int) -> sympy.Symbol:
    """What `ShapeEnv.create_symbol` does, less the search for the line of code to blame: that alone imports half of
    torch's compiler, 0.5 s."""
    symbol = sympy.Symbol(name, positive=True, integer=True)
    nowhere = SLoc("a remembered Program", None)
    env.unique_ids.add(int(name[1:]))
    add_value = getattr(env, "add_backed_var_to_val", None) or env.add_var_to_val  # its name before 2.13
    add_value(symbol, hint)
    env.var_to_range[symbol] = ValueRanges(low, int_oo if high is None else high)
    env.var_to_range_sloc[symbol] = ValueRangesSLoc(nowhere, nowhere)
    env.var_to_sources[symbol] = []
    env.symbol_guard_counter[symbol] = 0
    return symbol


class Sizes:
    """The symbolic sizes of one graph: a `ShapeEnv` of their own, and the fake tensors that have them.

    Args:
        ranges: lower and upper bound (None: any) of each symbol.
        hints: the sizes of the call that the graph is rebuilt for.
    """

    def __init__(self, ranges: Mapping[str, tuple[int, int | None]], hints: Mapping[str, int]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True, export=True)
        self.hints = dict(hints)
        self.symbols = {name: self._symbol(name, *bounds) for name, bounds in ranges.items()}
        self._ints: dict[str, Any] = {}
        self._tensors: dict[int, Tensor] = {}

    def _symbol(self, name: str, low: int, high: int | None) -> sympy.Symbol:
        if not _SYMBOL.fullmatch(name) or type(low) is not int or (high is not None and type(high) is not int):
            raise NotData(f"the symbol {name}")
        return _symbol(self.env, name, low, high, self.hints[name])

    def divisible(self, data: Any) -> None:
        """Says that this expression is zero for every size that the graph serves."""
        self.env._add_divisible(self._expression(data))

    def size(self, data: Any) -> int | torch.SymInt:
        """What `encode_size` made `data` of."""
        if type(data) is int:
            return data
        key = repr(data)
        if key not in self._ints:
            expression = self._expression(data)
            hint = int(expression.xreplace({symbol: self.hints[name] for name, symbol in self.symbols.items()}))
            self._ints[key] = self.env.create_symintnode(expression, hint=hint)
        return self._ints[key]

    def _expression(self, data: Any) -> Any:
        if type(data) is int:
            return sympy.Integer(data)
        if type(data) is str:
            return self.symbols[data]
        name, *arguments = data
        built = [self._expression(argument) for argument in arguments]
        if name == "**":
            if type(arguments[1]) is not int or not 0 < arguments[1] <= _LARGEST_POWER:
                raise NotData("a size to a large power")
            return sympy.Pow(*built)
        return _EXPRESSIONS[name](*built)

    def tensor(self, number: int, data: Mapping[str, Any]) -> Tensor:
        """A new fake tensor of the layout `data`, the graph's `number`th: most nodes share theirs with many others, and
        it is working out a symbolic layout that takes time (2 ms; 0.05 ms from there)."""
        if number not in self._tensors:
            size, stride = ([self.size(part) for part in data[name]] for name in ("size", "stride"))
            dtype = torch_constant("dtype", data["dtype"])
            with torch.no_grad():
                self._tensors[number] = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        fake = FakeTensor(self.mode, self._tensors[number].detach(), torch.device(data["device"]))
        return fake.requires_grad_() if data["requires_grad"] is True else fake


def encode_layout(tensor: Tensor, known: frozenset[str]) -> dict[str, Any]:
    """What a fake tensor is made of, for `Sizes.tensor`."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise NotData(f"a tensor of layout {tensor.layout}")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "size": [encode_size(size, known) for size in tensor.shape],
        "stride": [encode_size(stride, known) for stride in tensor.stride()],
        "requires_grad": tensor.requires_grad,
    }
