"""A pattern made ready for matching: traced once, its parameters classified, its scalars told from its constants."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from burnish.graph.effects import input_nodes, is_pure
from burnish.graph.leaves import is_leaf_call
from burnish.graph.normalize import SHAPE_ARGUMENTS, Call, canonical
from burnish.graph.sentinels import trace_with_scalars
from burnish.graph.trace import signature_of, trace

SCALARS = (bool, int, float, str, torch.dtype)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a pattern: what it may bind.

    `types` is empty for parameters that bind any node or constant, else the Python types of the constants they bind.
    """

    name: str
    types: tuple[type, ...] = ()
    optional: bool = False

    @property
    def is_scalar(self) -> bool:
        return bool(self.types)

    def refuses(self, value: Any) -> str | None:
        """Why the parameter cannot bind a constant, or None where it can."""
        if not self.types or (value is None and self.optional):
            return None
        allowed = (*self.types, int) if float in self.types else self.types
        if isinstance(value, bool):
            fits = bool in self.types
        else:
            fits = isinstance(value, allowed)
        return None if fits else f"{value!r} does not fit the parameter {self.name}: {self._type_names()}"

    def _type_names(self) -> str:
        return " | ".join(t.__name__ for t in self.types)


class Pattern:
    """A prepared pattern, reusable over any number of graphs. Make one with `Pattern.of`.

    parameters: by name, in the order of the signature
    fixed:      parameters whose example was None: the pattern is specialised to that, matches bind them to None
    outputs:    the nodes that a match's result consists of, in order
    from_examples: traced from example inputs, so that integers in shape lists are the examples' sizes and bind anything
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        parameters: dict[str, Parameter],
        fixed: dict[str, None],
        state: frozenset[str],
        name: str,
    ) -> None:
        self.gm = gm
        self.parameters = parameters
        self.fixed = fixed
        self.name = name
        self.from_examples = any("val" in n.meta for n in gm.graph.nodes if n.op == "placeholder")
        self._state = state
        self.outputs = self._read_outputs()
        self.roots = self._find_roots()
        reached = self._reach(self.roots)
        self.nodes = tuple(n for n in gm.graph.nodes if n in reached and n.op not in ("placeholder", "get_attr"))
        self.calls: dict[fx.Node, Call] = {n: canonical(n, gm) for n in self.nodes}
        self.parameter_of: dict[fx.Node, Parameter] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder" and str(node.target) in parameters:
                self.parameter_of[node] = parameters[str(node.target)]
                if node not in reached:
                    raise ValueError(
                        f"pattern {name}: parameter {node.target} is not used; remove it, or use it in the result"
                    )

    @classmethod
    def of(cls, fn: Callable[..., Any] | nn.Module | Pattern, example_inputs: tuple[Any, ...] | None = None) -> Pattern:
        """Trace and prepare a function, module or GraphModule.

        With `example_inputs` (one per parameter; trailing defaults may be left out) the pattern is traced to ATen
        operators like an exported model. Python scalars among the examples, or annotated as such, bind any constant.

        Raises TypeError or ValueError in one line for a pattern that cannot be matched.
        """
        if isinstance(fn, Pattern):
            return fn
        if not callable(fn):
            raise TypeError(f"pattern must be a function, a module or a Pattern, got {type(fn).__name__}")
        name = getattr(fn, "__name__", type(fn).__name__)
        state = _state_names(fn)
        if example_inputs is None:
            gm = trace(fn)
            parameters = _parameters(fn, gm)
            return cls(gm, parameters, {}, state, name)
        declared = _declared_parameters(fn)
        values = _bind_examples(fn, name, example_inputs)
        for parameter, value in values.items():
            if isinstance(value, SCALARS) and not declared[parameter].is_scalar:
                declared[parameter] = Parameter(parameter, _loosened(type(value)))
        fixed = {parameter: None for parameter, value in values.items() if value is None}
        scalars = {n: v for n, v in values.items() if isinstance(v, SCALARS)}
        gm = trace_with_scalars(fn, name, values, scalars, _is_size)
        parameters = {n: p for n, p in declared.items() if n not in fixed}
        return cls(gm, parameters, fixed, state, name)

    def is_wild_size(self, argument: str) -> bool:
        """Whether integers in this argument are sizes of the example inputs, which say nothing about the model's."""
        return self.from_examples and _is_size(argument)

    def is_state(self, node: fx.Node) -> bool:
        """Whether a get_attr of the pattern is a parameter or buffer (binds the model's) and not a constant."""
        return node.target in self._state

    def __repr__(self) -> str:
        return f"Pattern({self.name}: {', '.join(self.parameters)}; {len(self.nodes)} nodes)"

    def _read_outputs(self) -> tuple[fx.Node, ...]:
        returned = self.gm.graph.output_node().args[0]
        outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        for output in outputs:
            if not isinstance(output, fx.Node) or output.op in ("placeholder", "get_attr"):
                raise ValueError(
                    f"pattern {self.name}: returns {output}, which it does not compute; return results of its "
                    "operations, one or a flat tuple"
                )
        return outputs

    def _find_roots(self) -> tuple[fx.Node, ...]:
        """Nodes from which all others are reached: outputs that no other output needs, and unused side effects."""
        needed: set[fx.Node] = set()
        for node in self.outputs:
            needed |= self._reach(node.all_input_nodes)
        effects = [
            n for n in self.gm.graph.nodes if not n.users and n.op.startswith("call") and not is_pure(n, self.gm)
        ]
        candidates = dict.fromkeys([*self.outputs, *effects])
        return tuple(n for n in candidates if n not in needed)

    @staticmethod
    def _reach(starts: typing.Iterable[fx.Node]) -> set[fx.Node]:
        reached: set[fx.Node] = set()
        pending = list(starts)
        while pending:
            node = pending.pop()
            if node not in reached:
                reached.add(node)
                pending.extend(node.all_input_nodes)
        return reached


def _is_size(argument: str) -> bool:
    return argument in SHAPE_ARGUMENTS


def _state_names(fn: Any) -> frozenset[str]:
    if not isinstance(fn, nn.Module):
        return frozenset()
    names = {n for n, _ in fn.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in fn.named_buffers(remove_duplicate=False)}
    return frozenset(n for n in names if not n.startswith(("_tensor_constant", "lifted_tensor")))


def _annotations(fn: Any) -> dict[str, Any]:
    function = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names only known to type checkers: such parameters bind anything
        return {}


def _declared_parameters(fn: Callable[..., Any] | nn.Module) -> dict[str, Parameter]:
    hints = _annotations(fn)
    return {
        name: _classify(name, hints.get(name, inspect.Parameter.empty), p.default)
        for name, p in signature_of(fn).parameters.items()
    }


def _classify(name: str, annotation: Any, default: Any) -> Parameter:
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    wanted = tuple(o for o in options if o in SCALARS)
    if wanted and all(o in SCALARS or o is type(None) for o in options):
        return Parameter(name, wanted, optional=type(None) in options)
    if annotation is inspect.Parameter.empty and isinstance(default, SCALARS):
        return Parameter(name, _loosened(type(default)))
    return Parameter(name)


def _loosened(kind: type) -> tuple[type, ...]:
    """An example of 1 does not mean that 0.5 is excluded: only annotations are strict about that."""
    return (int, float) if kind in (int, float) else (kind,)


def _parameters(fn: Callable[..., Any] | nn.Module, gm: fx.GraphModule) -> dict[str, Parameter]:
    placeholders = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    if isinstance(fn, fx.GraphModule):
        return {name: Parameter(name) for name in placeholders}
    declared = _declared_parameters(fn)
    return {name: declared.get(name, Parameter(name)) for name in placeholders}


def _bind_examples(fn: Callable[..., Any] | nn.Module, name: str, examples: tuple[Any, ...]) -> dict[str, Any]:
    if not isinstance(examples, tuple):
        raise TypeError(f"pattern {name}: example_inputs must be a tuple, got {type(examples).__name__}")
    try:
        bound = signature_of(fn).bind(*examples)
    except TypeError as error:
        raise TypeError(f"pattern {name}: example_inputs do not fit its parameters: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def leaves(arg: Any) -> Iterator[Any]:
    """Nodes and constants inside an argument."""
    found: list[Any] = []
    map_aggregate(arg, found.append)
    return iter(found)


__all__ = ["SCALARS", "Parameter", "Pattern", "input_nodes", "is_leaf_call", "leaves"]
