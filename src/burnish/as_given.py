"""A model's weights as the user stored them, after packing has stored some of them otherwise."""

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
        self._strides = {weight: weight.stride() for weight in model.parameters()}

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

    def restore(self) -> bool:
        """Stores the weights as they were; whether any was stored otherwise.

        The state of an optimizer lies as the weights did at its first step, and PyTorch's fused AdamW on the CPU reads
        it as if it lay as they do now: it would update the wrong entries, silently (torch 2.13).
        """
        changed = [(weight, strides) for weight, strides in self._stored() if weight.stride() != strides]
        with torch.inference_mode(False), torch.no_grad():
            for weight, strides in changed:
                as_it_was = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
                weight.data = as_it_was.copy_(weight.detach())
        return bool(changed)

    def _stored(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The weights that the model had then, and still has, and their strides then."""
        return [(weight, self._strides[weight]) for weight in self.model.parameters() if weight in self._strides]
