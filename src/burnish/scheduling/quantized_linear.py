"""Linear layers whose weights are stored in fewer bits, and the model that they are right for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish import ops
from burnish.quantize import Kind, QuantizedWeight, dequantize, quantize_weight
from burnish.scheduling.clone import structural_clone


class QuantizedLinear(nn.Module):
    """x (..., in_features) -> (..., out_features), by a weight in 8 or 4 bits; see `burnish.quantize`.

    For `state_dict` it is the Linear that it was: `weight` is the dequantized weight there, and a float weight that is
    loaded is quantized. It cannot be trained.

    Attributes:
        source: the weight that it was made of, as a weak reference.
    """

    data: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        """ValueError where the weight cannot be quantized."""
        super().__init__()
        self.kind: Kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.source = weakref.ref(linear.weight)
        self.training = linear.training
        self._keep(quantize_weight(linear.weight, kind))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out_features, in_features): for models that ask for its dtype or device."""
        return dequantize(self.data, self.scales, None, self.kind, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.quantized_linear(x, self.data, self.scales, None, self.kind, self.bias)
        return y

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, kind={self.kind!r}"

    def _keep(self, weight: QuantizedWeight) -> None:
        self.register_buffer("data", weight.data, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            errors.append(f"size mismatch for {prefix}weight: it is {tuple(weight.shape)}, in the model {expected}")
        else:
            self._keep(quantize_weight(weight.to(self.data.device), self.kind))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class DequantizedLinear(nn.Module):
    """What a QuantizedLinear has to compute, in the dtype of `x`."""

    def __init__(self, quantized: QuantizedLinear) -> None:
        super().__init__()
        self.kind = quantized.kind
        self.register_buffer("data", quantized.data)
        self.register_buffer("scales", quantized.scales)
        self.bias = quantized.bias
        self.dtype = quantized.dtype

    @property
    def weight(self) -> Tensor:
        return self._in(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._in(x.dtype), self.bias)

    def _in(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.data, self.scales, None, self.kind, dtype)  # type: ignore[arg-type]


def quantized_in(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def with_dequantized(original: nn.Module, quantized: Iterable[QuantizedLinear]) -> nn.Module:
    """A copy of the model in which these weights, where Linears read them, are the dequantized ones."""
    copied = structural_clone(original)
    by_source = {id(module.source()): module for module in quantized}
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and (found := by_source.get(id(child.weight))) is not None:
                parent._modules[name] = DequantizedLinear(found)
    return copied
