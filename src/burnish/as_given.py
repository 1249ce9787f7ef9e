"""A model with its weights as the user stored them, after packing has stored some of them otherwise."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_MOST_BYTES = 1 << 30  # of weights that are copied to time a call


class AsGiven:
    """How the weights of a model were stored at one moment.

    A product reads a weight that is stored (K, N) at up to half the speed, or faster: times of the original on packed
    weights say little about what it took before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._strides = [weight.stride() for weight in model.parameters()]

    @property
    def is_changed(self) -> bool:
        return any(weight.stride() != strides for weight, strides in self._stored())

    def copied(self) -> nn.Module | None:
        """The model with copies of the weights that have changed, stored as they were; it shares the others. None where
        none has, where the copies would be large, or where the model cannot be copied."""
        changed = [(weight, strides) for weight, strides in self._stored() if weight.stride() != strides]
        if not changed or sum(weight.nbytes for weight, _ in changed) > _MOST_BYTES:
            return None
        kept: dict[int, Tensor] = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        for weight, strides in changed:
            as_it_was = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
            kept[id(weight)] = nn.Parameter(as_it_was.copy_(weight.detach()), weight.requires_grad)
        try:
            return copy.deepcopy(self.model, kept)
        except Exception:  # of the user's own attributes: what they raise is no matter here
            return None

    def _stored(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The weights and their strides then."""
        return list(zip(self.model.parameters(), self._strides, strict=True))
