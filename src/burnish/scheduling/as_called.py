"""Whether captured graphs compute what their modules do, in the call of the model that they were captured in.

A forward that is traced can ask things that a tracer does not hear: `isinstance(x, Tensor)` is false of a proxy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.objects import is_opaque
from burnish.scheduling.tracing import TracedModule, Untraceable, finish


class _Seen(BaseException):
    """Ends the call: all that is compared was called. No Exception: a model may handle those."""


def check_as_called(model: nn.Module, inputs: ExampleInputs, graphs: Mapping[nn.Module, TracedModule]) -> None:
    """Calls the model in eval mode, up to where each module was called once, and its graph beside it.

    Raises Untraceable where a graph refuses the call or returns something else, and the module, called again, does not.
    Nothing is changed, random numbers included.
    """
    pending = dict(graphs)
    given: dict[nn.Module, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module] = _copied((args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (graph := pending.pop(module, None)) is not None:
            _compare(module, _runnable(graph), given[module], output)
        if not pending:
            raise _Seen

    handles: list[Any] = []
    with _evaluating(model), contextlib.suppress(_Seen), torch.no_grad(), torch.random.fork_rng():
        try:
            for module in graphs:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            args, kwargs = inputs.fresh()
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _compare(module: nn.Module, graph: nn.Module, given: Any, output: Any) -> None:
    try:
        found = _forward(graph, given)
    except Exception as error:  # the module's code, differently put together, may fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Untraceable(
            f"{type(module).__name__} cannot be traced: its graph fails on these inputs: {reason}"
        ) from error
    if not _same(found, output) and _same(_forward(module, given), output):
        raise Untraceable(
            f"{type(module).__name__} cannot be traced: its graph returns something else than the module; it may ask "
            "whether a value is a tensor"
        )


def _forward(module: nn.Module, given: Any) -> Any:
    """Without the hooks."""
    args, kwargs = _copied(given)
    return module.forward(*args, **kwargs)


def _runnable(graph: TracedModule) -> nn.Module:
    """The graph as it will be, before anything in it is replaced."""
    made = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    finish(made)
    made.training = False  # of what is inside, the call of the model has changed it
    return made


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _copied(given: Any) -> Any:
    """Tensors and caches copied, which a call may change."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf) if is_opaque(leaf) else leaf

    return pytree.tree_map(copied, given, is_leaf=is_opaque)


def _same(found: Any, output: Any) -> bool:
    """Bit by bit: the same operators ran."""
    ours, theirs = ([t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)] for value in (found, output))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(ours, theirs, strict=True)
    )
