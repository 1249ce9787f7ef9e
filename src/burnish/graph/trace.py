"""Functions and modules as fx graphs, in one of two dialects: what they call (symbolic), or ATen operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from burnish.graph.clean import clean

__all__ = ["clean", "signature_of", "trace"]


def trace(
    fn: Callable[..., Any] | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
) -> fx.GraphModule:
    """Record `fn` as a graph whose placeholders carry the names of its parameters.

    Without inputs: symbolic tracing; modules of `torch.nn` stay whole as `call_module` nodes, and a single such module
    becomes a graph of one call. With inputs: `torch.export` (non-strict), composite operators kept, then `clean`ed.
    A GraphModule without inputs is returned as it is.

    Raises TypeError where `fn` is not callable; errors of the tracers pass through.
    """
    if not callable(fn):
        raise TypeError(f"trace: fn must be a function or a module, got {type(fn).__name__}")
    if example_inputs is not None or example_kwargs is not None:
        if example_inputs is not None and not isinstance(example_inputs, tuple):
            raise TypeError(f"trace: example_inputs must be a tuple, got {type(example_inputs).__name__}")
        module = fn if isinstance(fn, nn.Module) else _as_module(fn)
        args, kwargs = _distinct((example_inputs or (), example_kwargs or {}))
        exported = torch.export.export(module, args, kwargs, strict=False)
        gm = exported.module()
        clean(gm)
        return gm
    if isinstance(fn, fx.GraphModule):
        return fn
    if isinstance(fn, nn.Module) and fx.Tracer().is_leaf_module(fn, ""):
        return _single_call(fn)
    return fx.symbolic_trace(fn)


def signature_of(fn: Callable[..., Any] | nn.Module) -> inspect.Signature:
    """The signature that a caller of the function or module sees, without `self`."""
    return inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)


def _distinct(inputs: Any) -> Any:
    """The inputs with copies for tensors that occur twice: export would take two parameters for one."""
    seen: set[int] = set()

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        repeated = id(value) in seen
        seen.add(id(value))
        return value.detach().clone().requires_grad_(value.requires_grad) if repeated else value

    return tree_map(copy, inputs)


def _as_module(fn: Callable[..., Any]) -> nn.Module:
    """`fn` behind a module whose forward has the same signature, so that export names the inputs alike."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [receiver]
    for p in inspect.signature(fn).parameters.values():
        parameters.append(p.replace(annotation=p.empty))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module: nn.Module = type("Function", (nn.Module,), {"forward": forward})()
    return module


def _single_call(module: nn.Module) -> fx.GraphModule:
    name = type(module).__name__.lower()
    graph = fx.Graph()
    inputs = []
    for parameter in signature_of(module).parameters.values():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            inputs.append(graph.placeholder(parameter.name))
    graph.output(graph.call_module(name, tuple(inputs)))
    return fx.GraphModule(nn.ModuleDict({name: module}), graph, class_name=type(module).__name__)
