"""Trace a pattern from example inputs and keep its scalar parameters open, although export writes constants for them.

A float is given an odd value that nobody writes by hand; where it turns up in the graph, the parameter stood. For other
scalars (a `dim`, a number of heads, a dtype) the pattern is traced with two ordinary values, and the constants that
changed are the parameter's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from burnish.graph.trace import trace

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
_WORDS = ("none", "tanh", "mean", "sum", "constant", "reflect", "replicate")

# A place in a graph: the node's position, and the steps into its (args, kwargs) to one constant.
_Place = tuple[int, tuple[Any, ...]]


def trace_with_scalars(
    fn: Callable[..., Any] | nn.Module,
    name: str,
    values: dict[str, Any],
    scalars: dict[str, Any],
    is_size: Callable[[str], bool],
) -> fx.GraphModule:
    """`fn` in ATen dialect with the constants that came from `scalars` replaced by their placeholders.

    values: all example inputs by parameter name; `is_size` tells which arguments hold example sizes and need no care.
    Raises ValueError where a scalar cannot be kept open.
    """
    # Floats only: an odd integer as the bound of a slice would change which nodes are no-ops.
    odd = (0.3183098861837907 + 0.0271828182845904 * i for i in range(len(scalars)))
    floats = {p: number for (p, v), number in zip(scalars.items(), odd, strict=True) if type(v) is float}
    base_values = {**values, **floats}
    gm = _trace(fn, base_values)
    places = {p: _occurrences(gm, v) for p, v in floats.items()}
    for parameter, value in scalars.items():
        if parameter not in floats:
            places[parameter] = _compare_traces(fn, name, gm, base_values, parameter, value, is_size)
    return _open(gm, name, places)


def _try_trace(fn: Callable[..., Any] | nn.Module, values: dict[str, Any]) -> fx.GraphModule | None:
    """The trace, or None: any error of any operator may come of a value that only serves to tell constants apart."""
    try:
        return _trace(fn, values)
    except Exception:
        return None


def _trace(fn: Callable[..., Any] | nn.Module, values: dict[str, Any]) -> fx.GraphModule:
    """`fn` in ATen dialect, default arguments written out: a value that is the default would leave no place behind."""
    dtypes = {p: v for p, v in values.items() if isinstance(v, torch.dtype)}
    others = {p: v for p, v in values.items() if p not in dtypes}
    gm = trace(_without_dtypes(fn, others, dtypes) if dtypes else fn, tuple(others.values()))
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        for parameter in dtypes:
            gm.graph.placeholder(parameter)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            arguments = node.target._schema.arguments
            given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | dict(node.kwargs)
            every = {a.name: given.get(a.name, a.default_value) for a in arguments}
            node.args = tuple(every.pop(a.name) for a in arguments if not a.kwarg_only)
            node.kwargs = every
    return gm


def _without_dtypes(fn: Callable[..., Any], others: dict[str, Any], dtypes: dict[str, Any]) -> Callable[..., Any]:
    """`fn` as a function of its other parameters: export takes no dtype for an input."""

    def call(*args: Any) -> Any:
        return fn(**dict(zip(others, args, strict=True)), **dtypes)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter(p, kind) for p in others])  # type: ignore[attr-defined]
    return call


def _open(gm: fx.GraphModule, name: str, places: dict[str, list[_Place]]) -> fx.GraphModule:
    placeholders = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    nodes = list(gm.graph.nodes)
    for parameter, found in places.items():
        if not found:
            raise ValueError(
                f"pattern {name}: the value of {parameter} does not occur as such in the traced pattern (it is unused, "
                "or used only after arithmetic); make the number that occurs the parameter"
            )
        for position, path in found:
            node = nodes[position]
            node.args, node.kwargs = _replaced((node.args, node.kwargs), path, placeholders[parameter])
    gm.recompile()
    return gm


def _constants(arg: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(arg, (tuple, list)):
        for i, item in enumerate(arg):
            yield from _constants(item, (*path, i))
    elif isinstance(arg, dict):
        for key, item in arg.items():
            yield from _constants(item, (*path, key))
    else:
        yield path, arg


def _replaced(arg: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    if isinstance(arg, dict):
        return {k: _replaced(v, path[1:], value) if k == path[0] else v for k, v in arg.items()}
    return tuple(_replaced(v, path[1:], value) if i == path[0] else v for i, v in enumerate(arg))


def _places(gm: fx.GraphModule) -> Iterator[tuple[_Place, Any]]:
    for position, node in enumerate(gm.graph.nodes):
        if node.op != "output":
            for path, value in _constants((node.args, node.kwargs)):
                yield (position, path), value


def _occurrences(gm: fx.GraphModule, value: Any) -> list[_Place]:
    return [place for place, found in _places(gm) if type(found) is type(value) and found == value]


def _alternatives(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return tuple(dict.fromkeys(v for v in (value + 1, value - 1, 2 * value, value // 2, 1, 2, -1, 0) if v != value))
    options: tuple[Any, ...] = _DTYPES if isinstance(value, torch.dtype) else _WORDS
    return tuple(o for o in options if o != value)


def _compare_traces(
    fn: Callable[..., Any] | nn.Module,
    name: str,
    base: fx.GraphModule,
    values: dict[str, Any],
    parameter: str,
    value: Any,
    is_size: Callable[[str], bool],
) -> list[_Place]:
    """Where the traces with `value` and with another value differ: those constants are the parameter's."""
    for other in _alternatives(value):
        gm = _try_trace(fn, {**values, parameter: other})
        if gm is None or not _same_structure(base, gm):
            continue
        found: list[_Place] = []
        derived: list[Any] = []
        for (place, before), (_, after) in zip(_places(base), _places(gm), strict=True):
            if isinstance(before, fx.Node) or (type(before) is type(after) and before == after):
                continue
            if before == value and after == other:
                found.append(place)
            elif not _is_size_place(base, place, is_size):
                derived.append(before)
        if derived:
            raise ValueError(
                f"pattern {name}: {derived[0]} depends on {parameter} but is not its value; make the number that "
                "occurs the parameter"
            )
        return found
    raise ValueError(
        f"pattern {name}: what is computed depends on {parameter}={value!r}; write one pattern for each value instead"
    )


def _is_size_place(gm: fx.GraphModule, place: _Place, is_size: Callable[[str], bool]) -> bool:
    position, (part, index, *_) = place
    node = list(gm.graph.nodes)[position]
    if part == 0 and isinstance(node.target, torch._ops.OpOverload):
        return is_size(node.target._schema.arguments[index].name)
    return is_size(str(index))


def _same_structure(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    if len(a.graph.nodes) != len(b.graph.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for left, right in zip(a.graph.nodes, b.graph.nodes, strict=True):
        twin[left] = right
        if (left.op, left.target) != (right.op, right.target):
            return False
        ours, theirs = (list(_constants((n.args, n.kwargs))) for n in (left, right))
        if [path for path, _ in ours] != [path for path, _ in theirs]:
            return False
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            if isinstance(mine, fx.Node) and twin[mine] is not other:
                return False
    return True
