"""How a model calls its submodules, seen on example inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.scheduling.objects import Opaque, is_opaque
from burnish.scheduling.tracer import Example, Known
from burnish.scheduling.tracing import Untraceable

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class ExampleInputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> ExampleInputs | None:
        """A tuple of positional arguments, or a dict of keyword arguments; None stays None. TypeError for others."""
        if given is None or isinstance(given, ExampleInputs):
            return given
        if isinstance(given, tuple):
            return cls(given)
        if isinstance(given, Mapping):
            return cls((), dict(given))
        raise TypeError(
            "example_inputs must be a tuple of positional arguments or a dict of keyword arguments, "
            f"got {type(given).__name__}"
        )

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one more call: with copies of caches, which each call lengthens."""
        given: tuple[Any, Any] = (self.args, dict(self.kwargs))
        return pytree.tree_map(lambda leaf: copy.deepcopy(leaf) if is_opaque(leaf) else leaf, given, is_leaf=is_opaque)


class Calls:
    """All calls of modules in one call of a model. Of tensors only shape, dtype and device are kept."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        """Runs the model, in eval mode, so that nothing that training keeps count of (batch norm) changes."""
        self._calls: dict[nn.Module, list[tuple[Any, Any]]] = {}
        modes = [(module, module.training) for module in model.modules()]
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module, _ in modes]
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng():
                args, kwargs = inputs.fresh()
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training

    def known(self, module: nn.Module) -> Known | None:
        """The constants with which the module is called, and examples of the rest; None where it is not called.

        Raises Untraceable where two calls of it have different constants.
        """
        calls = [_known(module, *call) for call in self._calls.get(module, ())]
        if any(call.constants != calls[0].constants for call in calls):
            raise Untraceable(f"{type(module).__name__} cannot be traced: it is called with different constants")
        return calls[0] if calls else None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        examples = pytree.tree_map(_example, (args, kwargs), is_leaf=is_opaque)
        self._calls.setdefault(module, []).append(examples)


def _example(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return Example.of(leaf)
    if isinstance(leaf, _CONSTANTS) or not is_opaque(leaf):
        return leaf
    try:
        return Opaque.of(leaf, Example.of)
    except Exception:  # what cannot be copied is not looked into
        return leaf


def _known(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Known:
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    constants: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            stars = "*" if kind is inspect.Parameter.VAR_POSITIONAL else "**"
            given = any(isinstance(leaf, (Example, Opaque)) for leaf in pytree.tree_leaves(value))
            (examples if given else constants)[stars + name] = value
        elif isinstance(value, _CONSTANTS):
            constants[name] = value
        else:
            examples[name] = value
    return Known(constants, examples)
