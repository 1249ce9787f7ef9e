"""One module as a graph that serves train and eval mode, its submodules kept whole unless they are to be inlined."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from burnish.graph.nested import Blocked
from burnish.graph.values import same_value
from burnish.scheduling.clone import bound_to, shallow_copy
from burnish.scheduling.sizes import Condition, refuse_other_inputs
from burnish.scheduling.tracer import Known, PartTracer

_BY_MODE = "by_mode"  # meta key: constants that differ between train and eval mode
_STANDARD = frozenset(vars(nn.Module()))


class TracedModule(fx.GraphModule):
    """A module as a graph. It keeps the module's name, attributes, hooks, and all of its children and tensors, also
    those that the graph does not use."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        copied: TracedModule = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        type(copied).__name__ = type(self).__name__
        copied.recompile()
        return copied


class Untraceable(ValueError):
    """Why a module cannot become a graph, in one line."""


def trace_variants(owner: nn.Module, path: str, inlined: Iterable[str], known: Known | None) -> list[TracedModule]:
    """The graphs that `owner` may stand for, the likeliest first.

    There is one, unless its forward asks whether an optional argument was given and nothing is known of its calls. Then
    the first is for calls without optional arguments, the second for calls with all of them; each refuses others.

    Args:
        path: of `owner`, for messages.
        inlined: paths, relative to `owner`, of descendants whose forward becomes part of the graph.

    Raises Untraceable where no graph can be made.
    """
    inlined = set(inlined)
    if known is not None:
        return [_assemble(owner, _trace_both_modes(owner, path, inlined, known), known.constants, must_be_given=True)]
    variable = _variable_arguments(owner)
    defaults = {**variable, **_defaults(owner)}
    if defaults == variable:
        return [_assemble(owner, _trace_both_modes(owner, path, inlined, Known(variable)), variable)]
    try:
        given = _trace_both_modes(owner, path, inlined, Known(variable))
    except Untraceable:
        return [_assemble(owner, _trace_both_modes(owner, path, inlined, Known(defaults)), defaults)]
    try:
        omitted = _trace_both_modes(owner, path, inlined, Known(defaults))
    except Untraceable:
        return [_assemble(owner, given, variable, must_be_given=True)]
    differences = _differences(given.graph, omitted.graph)
    if differences is not None and all(_is_default(d.first, d.second) for d in differences):
        return [_assemble(owner, given, variable)]
    return [_assemble(owner, omitted, defaults), _assemble(owner, given, variable, must_be_given=True)]


def trace_whole(root: nn.Module, known: Known, whole: set[int]) -> fx.GraphModule:
    """The graph of a call of which `known` is known, in the mode that the module is in: to be searched, not to be run.

    All submodules are inlined but those of `torch.nn`, those that do more than their forward, and `whole` (identities).
    Raises Blocked where it cannot be made.
    """
    leaf = fx.Tracer().is_leaf_module
    inlined = {
        id(module)
        for path, module in root.named_modules()
        if path and id(module) not in whole and not leaf(module, path) and not calls_more_than_forward(module)
    }
    shell = shallow_copy(root)  # a tracer leaves constants on what it traces
    tracer = PartTracer({id(shell), *inlined}, known)
    try:
        return fx.GraphModule(shell, tracer.trace(shell))
    except Exception as error:  # forward code may fail on proxies in any way
        raise Blocked(root if tracer.innermost is shell else tracer.innermost) from error


def finish(gm: fx.GraphModule) -> None:
    """Let constants that differ between train and eval mode follow the module's own flag, and recompile."""
    flag: fx.Node | None = None
    for node in list(gm.graph.nodes):
        for difference in node.meta.pop(_BY_MODE, ()):
            if flag is None:
                with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                    flag = gm.graph.create_node("get_attr", "training")
            with gm.graph.inserting_before(node):
                value = gm.graph.call_function(by_mode, (flag, difference.first, difference.second))
            node.args, node.kwargs = _replaced((node.args, node.kwargs), difference.where, value)
    gm.recompile()


def calls_more_than_forward(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: it has hooks, or is checkpointed."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, table, None) for table in tables)


def by_mode(training: bool, in_training: Any, in_eval: Any) -> Any:
    """One of two constants."""
    return in_training if training else in_eval


# --- tracing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traced:
    """A graph, and the copy of the module that was traced for it."""

    shell: nn.Module
    graph: fx.Graph
    conditions: tuple[Condition, ...] = ()


def _trace_both_modes(owner: nn.Module, path: str, inlined: set[str], known: Known) -> _Traced:
    try:
        training, evaluating = (_trace(owner, inlined, known, mode) for mode in (True, False))
    except Exception as error:  # forward code may fail on proxies in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]  # fx explains at length
        raise Untraceable(f"{_called(owner, path)} cannot be traced: {reason}") from error
    differences = _differences(training.graph, evaluating.graph)
    if differences is None or any(isinstance(v, fx.Node) for d in differences for v in (d.first, d.second)):
        raise Untraceable(f"{_called(owner, path)} cannot be traced: train and eval mode take different steps")
    for difference in differences:
        difference.node.meta.setdefault(_BY_MODE, []).append(difference)
    if not owner.training:  # the constants are those of the mode that is on, so that patterns find them
        for d in differences:
            d.node.args, d.node.kwargs = _replaced((d.node.args, d.node.kwargs), d.where, d.second)
    for module in (training.shell, *_copies(training.shell, owner, inlined)):
        module.training = owner.training
    return replace(training, conditions=tuple(dict.fromkeys((*training.conditions, *evaluating.conditions))))


def _trace(owner: nn.Module, inlined: set[str], known: Known, training: bool) -> _Traced:
    method = vars(owner).get("forward")
    if method is not None and getattr(method, "__self__", None) is not owner:
        raise ValueError("its forward was replaced by another function")
    for path in inlined:
        if calls_more_than_forward(owner.get_submodule(path)):
            raise ValueError(f"{path} is checkpointed or has hooks, so that it must stay whole")
    shell = shallow_copy(owner)
    copies = [shell, *_copies(shell, owner, inlined)]
    for module in copies:
        module.training = training
    tracer = PartTracer({id(module) for module in copies}, known)
    return _Traced(shell, tracer.trace(shell), tracer.conditions)


def _copies(shell: nn.Module, owner: nn.Module, inlined: set[str]) -> list[nn.Module]:
    """Puts copies in place of the modules to be inlined, and of the containers that they are in; returns them."""
    wanted: set[int] = set()
    for path in inlined:
        while path:
            wanted.add(id(owner.get_submodule(path)))
            path = path.rpartition(".")[0]
    made: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None and id(child) in wanted:
                if id(child) not in made:
                    made[id(child)] = shallow_copy(child)
                    visit(made[id(child)])
                module._modules[name] = made[id(child)]

    visit(shell)
    return list(made.values())


def _variable_arguments(owner: nn.Module) -> dict[str, Any]:
    """`*args` and `**kwargs` of a forward, by the names that fx gives them: a graph takes none of these."""
    empty: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(owner).forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            empty[f"*{name}"] = ()
        elif parameter.kind is parameter.VAR_KEYWORD:
            empty[f"**{name}"] = {}
    return empty


def _defaults(owner: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(owner).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _called(owner: nn.Module, path: str) -> str:
    return f"{path} ({type(owner).__name__})" if path else type(owner).__name__


# --- two graphs of one module -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    """Two arguments at the same place of the same node."""

    node: fx.Node
    where: tuple[Any, ...]
    first: Any
    second: Any


def _differences(first: fx.Graph, second: fx.Graph) -> list[_Difference] | None:
    """Where two graphs have other arguments; None where they have other nodes."""
    if len(first.nodes) != len(second.nodes):
        return None
    image: dict[fx.Node, fx.Node] = {}
    found: list[_Difference] = []
    for a, b in zip(first.nodes, second.nodes, strict=True):
        image[b] = a
        if (a.op, a.target) != (b.op, b.target):
            return None
        arguments = map_aggregate((b.args, b.kwargs), lambda v: image[v] if isinstance(v, fx.Node) else v)
        found += [_Difference(a, *difference) for difference in _unequal((a.args, a.kwargs), arguments, ())]
    return found


def _unequal(a: Any, b: Any, where: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any, Any]]:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in _unequal(*pair, (*where, i))]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in _unequal(a[key], b[key], (*where, key))]
    return [] if same_value(a, b) else [(where, a, b)]


def _is_default(given: Any, omitted: Any) -> bool:
    """Whether the one is an input of the graph, and the other what it is when it is not given."""
    if not (isinstance(given, fx.Node) and given.op == "placeholder" and given.args):
        return False
    return not isinstance(omitted, fx.Node) and same_value(given.args[0], omitted)


def _replaced(value: Any, where: tuple[Any, ...], new: Any) -> Any:
    """`value` with another argument at the place `where`."""
    if not where:
        return new
    at, *rest = where
    if isinstance(value, dict):
        return {key: _replaced(v, tuple(rest), new) if key == at else v for key, v in value.items()}
    return tuple(_replaced(v, tuple(rest), new) if i == at else v for i, v in enumerate(value))


# --- assembly ---------------------------------------------------------------------------------------------------------


def _assemble(
    owner: nn.Module, traced: _Traced, constants: Mapping[str, Any], must_be_given: bool = False
) -> TracedModule:
    shell, graph = traced.shell, traced.graph
    refuse_other_inputs(graph, traced.conditions)
    _refuse_other_calls(graph, constants, must_be_given)
    gm = TracedModule(shell, graph, class_name=type(owner).__name__)
    constant_tensors = {name: value for name, value in vars(shell).items() if isinstance(value, Tensor)}
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name, value in vars(shell).items():
        if name in _STANDARD or name not in vars(gm):
            gm.__dict__[name] = bound_to(gm, value, shell)
    for name in used & constant_tensors.keys():
        del gm.__dict__[name]
        gm.register_buffer(name, constant_tensors[name], persistent=False)
    return gm


def _refuse_other_calls(graph: fx.Graph, constants: Mapping[str, Any], must_be_given: bool) -> None:
    """Calls that the graph is not for raise instead of computing something else."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before():
        for node in inputs:
            name = str(node.target)
            if name in constants:
                graph.call_function(expect, (node, constants[name], name))
            elif (
                must_be_given and node.args and node.args[0] is None and any(u.op != "call_module" for u in node.users)
            ):
                graph.call_function(expect_given, (node, name))


def expect(value: Any, traced: Any, name: str) -> None:
    """ValueError where an argument is not what it was when the module was traced."""
    if isinstance(value, fx.Proxy):  # traced again: the question stays in the graph
        value.tracer.create_proxy("call_function", expect, (value, traced, name), {})
        return
    same = value is traced if traced is None or isinstance(value, Tensor) else value == traced
    if not same:
        given = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name.lstrip('*')}: the module was traced for {traced!r} and got {given}; give create_schedule example "
            "inputs that call it in this way"
        )


def expect_given(value: Any, name: str) -> None:
    """ValueError where an optional argument, with which the module was traced, is missing."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", expect_given, (value, name), {})
        return
    if value is None:
        raise ValueError(
            f"{name}: the module was traced for calls with it and got None; give create_schedule example inputs that "
            "call it in this way"
        )
