"""What a zoo entry is, and the seeded weights and inputs that all entries share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BATCH, SEQ = "batch", "seq"

Build = Callable[[], nn.Module]
Inputs = Callable[[int, int, torch.dtype], dict[str, Tensor]]

# (batch, seq) that a model must be right at. The first is the one to capture with; then batch 1, odd sizes, sequence 1.
SHAPES = ((2, 16), (1, 16), (3, 33), (2, 1), (1, 257))


@dataclass(frozen=True)
class Stack:
    """Equal layers of a model: how many there are, and how often each Op occurs in one of them.

    `ops` counts what a layer means, before anything is fused: `attention`, `layer_norm`, `rms_norm`; `rope`, the
    tensors rotated; `linear`, every product with a weight matrix; `activation`, the linears that an activation
    follows, outside gated MLPs; `gated_mlp`, the groups down(act(gate(x)) * up(x)), whose three linears are in `linear`
    too; `residual`, the sums with the stream.
    """

    name: str
    layers: int
    ops: Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """One model: how to build it, what to feed it, which dims are free, and what is inside.

    `build()` gives the model in eval mode; `inputs(batch, seq, dtype)` its keyword arguments, floating ones in `dtype`.
    `axes` names the dims of every input: "batch" and "seq" may change between calls, an int is fixed by the model.
    `outside` counts, like `Stack.ops`, what stands outside the stacks: embedding norm, final norm, pooler, head.
    `notes` says what is unusual about the model, for whoever reads a failing test.
    """

    name: str
    build: Build
    inputs: Inputs
    axes: Mapping[str, tuple[str | int, ...]]
    stacks: tuple[Stack, ...]
    outside: Mapping[str, int] = field(default_factory=dict)
    shapes: tuple[tuple[int, int], ...] = SHAPES
    marks: tuple[pytest.MarkDecorator, ...] = ()
    notes: str = ""

    @property
    def layers(self) -> int:
        """Layers of all stacks together."""
        return sum(stack.layers for stack in self.stacks)

    def total(self) -> Counter[str]:
        """Occurrences of each Op in the whole model."""
        counts = Counter(self.outside)
        for stack in self.stacks:
            counts.update({op: n * stack.layers for op, n in stack.ops.items()})
        return counts

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """The `dynamic_shapes` argument of `torch.export.export` that frees batch and sequence."""
        return {
            name: {i: torch.export.Dim.AUTO for i, axis in enumerate(dims) if axis in (BATCH, SEQ)}
            for name, dims in self.axes.items()
        }


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode, every parameter drawn anew: matrices N(0, 1/fan_in), norm weights about 1, biases about 0.

    The usual initialisation (std 0.02, biases 0, norm weights 1) makes attention all but uniform, and a rewrite that
    forgets a bias or a norm's weight would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2:
                    # Hugging Face's Conv1D, GPT-2's linear, stores its weight as (in, out).
                    fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else math.prod(parameter.shape[1:])
                    parameter.copy_(noise * fan_in**-0.5)
                else:
                    parameter.copy_(0.2 * noise + (1.0 if name == "weight" else 0.0))
    return model.eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """`model` with every dropout probability set to 0, in place: its train mode becomes deterministic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def hidden(batch: int, seq: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Hidden states (batch, seq, width): N(0, 1), with about one value in a hundred ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq, width, generator=generator)
    outlier = torch.rand(batch, seq, width, generator=generator) < 0.01
    return torch.where(outlier, 10 * x, x).to(dtype)


def token_ids(batch: int, seq: int, vocab: int, seed: int = 2) -> Tensor:
    """Token ids (batch, seq), int64, from 3 up: the configs here keep 0, 1 and 2 for padding, start and end."""
    return torch.randint(3, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def padding_mask(batch: int, seq: int) -> Tensor:
    """Right padding, (batch, seq) int64 with 1 = real token: the first row is full, each next one a quarter shorter."""
    lengths = torch.tensor([max(1, seq - row * seq // 4) for row in range(batch)])
    return (torch.arange(seq) < lengths[:, None]).long()


def causal_mask(seq: int) -> Tensor:
    """(seq, seq) float32: 1 on and below the diagonal, 0 above."""
    return torch.tril(torch.ones(seq, seq))
