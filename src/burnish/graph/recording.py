"""What a replacement computes for one match, and where its modules and tensors live in the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn


@dataclass
class Recording:
    """What a replacement computes for one match, in a graph of its own.

    nodes:   its calls, in order; inputs: its placeholders and reused weights -> nodes of the model's graph
    outputs: its results; targets: calls and weights that live under another path in the model
    """

    nodes: list[fx.Node]
    inputs: dict[fx.Node, fx.Node]
    outputs: list[fx.Node]
    targets: dict[fx.Node, str]
    added: dict[fx.Node, tuple[str, nn.Module | torch.Tensor]] = field(default_factory=dict)

    def install(self, gm: fx.GraphModule) -> None:
        """Register the modules and tensors that the replacement brings along, each object once."""
        for node, (name, value) in self.added.items():
            self.targets[node] = path_of(gm, value) or _register(gm, name.replace(".", "_"), value)


def path_of(gm: fx.GraphModule, value: nn.Module | torch.Tensor) -> str | None:
    """The path of a module, parameter or buffer in the model; None where it is not one of the model's."""
    named: Iterator[tuple[str, Any]]
    if isinstance(value, nn.Module):
        named = gm.named_modules(remove_duplicate=False)
    else:
        named = (item for found in (gm.named_parameters, gm.named_buffers) for item in found(remove_duplicate=False))
    return next((name for name, candidate in named if candidate is value and name), None)


def _register(gm: fx.GraphModule, name: str, value: nn.Module | torch.Tensor) -> str:
    unique, count = name, 0
    while hasattr(gm, unique):
        count += 1
        unique = f"{name}_{count}"
    if isinstance(value, nn.Module):
        gm.add_module(unique, value)
    elif isinstance(value, nn.Parameter):
        gm.register_parameter(unique, value)
    else:
        gm.register_buffer(unique, value)
    return unique
