"""Linear layers whose weights are stored in fewer bits, and the model that they are right for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish import ops
from burnish.quantize import Kind, dequantize, quantize_weight
from burnish.scheduling.clone import structural_clone


class QuantizedLinear(nn.Module):
    """x (..., in_features) -> (..., out_features), by a weight in 8 or 4 bits; see `burnish.quantize`.

    For `state_dict` it is the layer that it was: `weight` is the dequantized weight there, and a float weight that is
    loaded is quantized. It cannot be trained.

    Attributes:
        source: the weight that it was made of, as a weak reference.
        is_transposed: whether that is (in_features, out_features), as in Hugging Face's Conv1D.
    """

    data: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Module, kind: Kind) -> None:
        """
        Args:
            linear: an nn.Linear, or Hugging Face's Conv1D.

        Raises ValueError where the weight cannot be quantized.
        """
        super().__init__()
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.kind: Kind = kind
        self.is_transposed = type(linear) is not nn.Linear
        self.dtype = weight.dtype
        self.source = weakref.ref(weight)
        self.training = linear.training
        self._keep(weight)
        self.out_features, self.in_features = self._stored(weight).shape
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, as the layer had it: for models that ask for its dtype or device."""
        return self._stored(dequantize(self.data, self.scales, None, self.kind, self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.quantized_linear(x, self.data, self.scales, None, self.kind, self.bias)
        return y

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, kind={self.kind!r}"

    def _keep(self, weight: Tensor) -> None:
        quantized = quantize_weight(self._stored(weight), self.kind)
        self.register_buffer("data", quantized.data, persistent=False)
        self.register_buffer("scales", quantized.scales, persistent=False)

    def _stored(self, weight: Tensor) -> Tensor:
        """From the layer's layout to (out_features, in_features), and back."""
        return weight.t() if self.is_transposed else weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != (expected := self.weight.shape):
            sizes = f"it is {tuple(weight.shape)}, in the model {tuple(expected)}"
            errors.append(f"size mismatch for {prefix}weight: {sizes}")
        else:
            self._keep(weight.to(self.data.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class DequantizedLinear(nn.Module):
    """What a QuantizedLinear has to compute, in the dtype of `x`."""

    def __init__(self, quantized: QuantizedLinear) -> None:
        super().__init__()
        self.kind = quantized.kind
        self.register_buffer("data", quantized.data)
        self.register_buffer("scales", quantized.scales)
        self.bias = quantized.bias
        self.dtype, self.is_transposed = quantized.dtype, quantized.is_transposed

    @property
    def weight(self) -> Tensor:
        weight = self._in(self.dtype)
        return weight.t() if self.is_transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._in(x.dtype), self.bias)

    def _in(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.data, self.scales, None, self.kind, dtype)  # type: ignore[arg-type]


def quantized_in(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def with_dequantized(original: nn.Module, quantized: Iterable[QuantizedLinear]) -> nn.Module:
    """A copy of the model in which these weights, where Linears read them, are the dequantized ones."""
    from burnish.parallel.layers import is_linear

    copied = structural_clone(original)
    by_source = {id(module.source()): module for module in quantized}
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if child is not None and is_linear(child) and (found := by_source.get(id(child.weight))) is not None:
                parent._modules[name] = DequantizedLinear(found)
    return copied
