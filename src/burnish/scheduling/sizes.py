"""Sizes of example inputs as symbols, and what a forward asks about them while it is captured.

A forward may branch on a size, or need one as a number. The answer is that of the examples, and becomes a condition on
the inputs: the graph refuses calls that would get another answer. Sizes that nobody asks about stay free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

HINT = "give create_schedule example inputs that call it in this way"
_SIZES = ("shape", "size")


@dataclass(frozen=True)
class Dimension:
    """One size of an input: the input's name, where in it the tensor is (an index or key for each level; None for
    somewhere in an object), and which."""

    name: str
    path: tuple[Any, ...] | None
    dim: int

    def __str__(self) -> str:
        if self.path is None:
            return f"a size in {self.name}"
        return f"{self.name.lstrip('*')}{''.join(f'[{key!r}]' for key in self.path)}.shape[{self.dim}]"


@dataclass(frozen=True)
class Condition:
    """What must hold of a call's inputs.

    `text` says it. `expression` has a symbol for each of `sizes`; it is None where the condition is on the dtype and
    the number of dimensions of one tensor: its input's name, where in that, and both.
    """

    text: str
    expression: sympy.Basic | None = field(compare=False)
    sizes: dict[sympy.Symbol, Dimension] = field(compare=False, default_factory=dict)
    tensor: tuple[str, tuple[Any, ...], torch.dtype, int] | None = field(compare=False, default=None)


class Sizes:
    """The sizes of one call's inputs, and the conditions that a forward made of them."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._env)
        self._dimensions: dict[sympy.Symbol, Dimension] = {}
        self._tensors: list[tuple[str, tuple[Any, ...], torch.dtype, int]] = []
        self._conditions: dict[str, Condition] = {}

    def fake(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str, path: Any) -> Tensor:
        """A fake tensor of an input, or of one at `path` inside of it, whose every size is a symbol."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        sizes = []
        for dim, size in enumerate(shape):
            dimension = Dimension(name, path, dim)
            source = ConstantSource(str(dimension))
            symbol: Any = self._env.create_symbol(
                size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            self._dimensions[symbol] = dimension
            sizes.append(self._env.create_symintnode(symbol, hint=size, source=source))
        if path is not None:
            self._tensors.append((name, path, dtype, len(shape)))
        with self.fakes:
            return torch.empty(sizes, dtype=dtype, device=device)

    def truth(self, value: Any, node: fx.Node) -> bool:
        """Whether a value that the forward asks about is true for the examples; noted as a condition."""
        import sympy

        if isinstance(value, (torch.SymBool, torch.SymInt, torch.SymFloat)):
            expression, answer = value.node._expr, bool(value)
            if not isinstance(value, torch.SymBool):
                expression = sympy.Ne(expression, 0)
            self._require(expression if answer else sympy.Not(expression))
            return answer
        self._require_the_same_kind(node)
        return bool(value)

    def number(self, value: Any, node: fx.Node) -> int:
        """The integer that a value is for the examples; noted as a condition."""
        import sympy

        if isinstance(value, torch.SymInt):
            expression, answer = value.node._expr, int(value)
            self._require(sympy.Eq(expression, answer))
            return answer
        self._require_the_same_kind(node)
        return int(value)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(self._conditions.values())

    def _require(self, expression: Any) -> None:
        import sympy
        from torch.utils._sympy.printers import PythonPrinter

        if expression in (True, sympy.true):
            return
        sizes = {symbol: self._dimensions[symbol] for symbol in expression.free_symbols}
        if hidden := next((dimension for dimension in sizes.values() if dimension.path is None), None):
            raise ValueError(f"it asks for {hidden}, which no condition on its inputs can be about")
        named = {symbol: sympy.Symbol(str(dimension), integer=True) for symbol, dimension in sizes.items()}
        text = PythonPrinter().doprint(expression.xreplace(named))
        self._conditions.setdefault(text, Condition(text, expression, sizes))

    def _require_the_same_kind(self, node: fx.Node) -> None:
        """Of dtypes and numbers of dimensions each input's stay. A size that is none any more was found to be a number,
        or equal to another, by an operator: such findings must hold, too."""
        import sympy

        for tensor in self._tensors:
            name, path, dtype, rank = tensor
            where = f"{name.lstrip('*')}{''.join(f'[{key!r}]' for key in path)}"
            text = f"{where} is {dtype} with {rank} dimensions"
            self._conditions.setdefault(text, Condition(text, None, tensor=tensor))
        if _comes_from_sizes(node):
            for symbol, found in self._env.replacements.items():
                if {symbol, *found.free_symbols} <= self._dimensions.keys():
                    self._require(sympy.Eq(symbol, found))


def _comes_from_sizes(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.target in _SIZES or (current.target is getattr and current.args[1] in _SIZES):
            return True
        if current.op in ("call_function", "call_method"):
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            pending += fresh
    return False


def refuse_other_inputs(graph: fx.Graph, conditions: Sequence[Condition]) -> None:
    """Has the graph check the conditions before it computes anything."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    if not conditions or not inputs:
        return
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def given(name: str, path: tuple[Any, ...]) -> Any:
        value: Any = fx.Proxy(inputs[name], tracer)
        for key in path:
            value = value[key]
        return value

    with graph.inserting_before(list(inputs.values())[-1].next):
        for condition in conditions:
            if condition.tensor is not None:
                name, path, dtype, rank = condition.tensor
                graph.call_function(expect_kind, (given(name, path).node, dtype, rank, condition.text))
            else:
                values = {symbol: given(d.name, d.path or ()).shape[d.dim] for symbol, d in condition.sizes.items()}
                holds = sympy_interp(PythonReferenceAnalysis, values, condition.expression)
                graph.call_function(expect_true, (holds.node, condition.text))


def expect_true(holds: Any, condition: str) -> None:
    """ValueError where a condition on sizes, which held when the module was captured, does not hold."""
    if isinstance(holds, fx.Proxy):  # traced again: the question stays in the graph
        holds.tracer.create_proxy("call_function", expect_true, (holds, condition), {})
    elif not holds:
        raise ValueError(f"the module was captured for calls with {condition}, which does not hold; {HINT}")


def expect_kind(tensor: Any, dtype: torch.dtype, rank: int, condition: str) -> None:
    """ValueError where a tensor has another dtype or number of dimensions than when the module was captured."""
    if isinstance(tensor, fx.Proxy):
        tensor.tracer.create_proxy("call_function", expect_kind, (tensor, dtype, rank, condition), {})
        return
    expect_true(tensor.dtype == dtype and tensor.dim() == rank, condition)


_FACTORIES = (
    *("arange", "empty", "eye", "finfo", "full", "linspace", "ones"),
    *("rand", "randn", "tensor", "tril", "triu", "zeros"),
)


@contextlib.contextmanager
def recorded_factories(record: Any) -> Iterator[None]:
    """Within the `with`, torch's functions that make tensors of sizes alone are recorded, where such a size is a value
    of the graph: fx sees only functions of tensors.

    record: called with the function, its arguments and its keyword arguments.
    """
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recording(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
                return record(function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in originals.items():
            setattr(torch, name, recording(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
