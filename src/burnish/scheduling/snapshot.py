"""The state of a module tree, to return to."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class _Container:
    """A dict, list or set, and what was in it."""

    value: Any
    content: Any

    def restore(self) -> None:
        # In place: a hook's handle knows the table that it is in.
        self.value.clear()
        if isinstance(self.value, list):
            self.value.extend(self.content)
        else:
            self.value.update(self.content)


@dataclass(frozen=True)
class _ModuleState:
    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    containers: tuple[_Container, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        attributes = dict(vars(module))
        containers = tuple(
            _Container(value, value.copy())
            for value in attributes.values()
            if type(value) in (dict, OrderedDict, list, set)
        )
        return cls(module, type(module), attributes, containers)

    def restore(self) -> None:
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for container in self.containers:
            container.restore()


@dataclass(frozen=True)
class Snapshot:
    """Classes, attributes, children, tensors and hooks of all modules of a tree; graphs and tensors' values are not in
    it, because no step changes them in place."""

    states: tuple[_ModuleState, ...]

    @classmethod
    def take(cls, root: nn.Module) -> Snapshot:
        return cls(tuple(_ModuleState.of(module) for module in root.modules()))

    def restore(self) -> None:
        """Every module as it was, the same objects at the same places."""
        for state in self.states:
            state.restore()
