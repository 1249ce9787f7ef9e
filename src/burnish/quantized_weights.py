"""The quantized copies of one model's weights, which all of its Programs share; and what quantizing them changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from burnish._text import human_bytes
from burnish.places import WeightPlace, find_weight
from burnish.quantize import KINDS, Kind, QuantizedWeight, quantize_weight

_FP8_CAPABILITY = (8, 9)


def check_kind(kind: Any, model: nn.Module) -> None:
    """ValueError where there is no such kind, or none on the model's device."""
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}: use one of {', '.join(map(repr, KINDS))}, or None")
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        if kind == "fp8" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"quantize='fp8': {name} has no float8 (compute capability 8.9 has); use 'int8'")


class Part(NamedTuple):
    """A weight by its path in the model; `transposed` where a product reads it as (N, K) and it is stored (K, N)."""

    path: str
    transposed: bool


@dataclass
class Quantization:
    """What the step "quantize" did to one Program.

    Attributes:
        kind: as it was asked for.
        products: how many matrix products read a quantized weight now.
        bytes_before, bytes_after: of those weights, each counted once.
        difference: how far the outputs of the model with the dequantized weights are from those with the weights as
            they are: root mean square, relative, of the output in which it is largest (padding and all), both computed
            in float64 on the first call's inputs. None where it was not measured (`verify=False`, dropout).
        sources: the weights that were copied, each with its version at that time.
    """

    kind: Kind
    products: int
    bytes_before: int
    bytes_after: int
    difference: float | None = None
    sources: list[tuple[WeightPlace, int]] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        said = f"{self.kind}: {self.products} products, {human_bytes(self.bytes_before)} -> "
        said += human_bytes(self.bytes_after)
        return said if self.difference is None else f"{said}; outputs differ by {self.difference:.2%} (rms)"


class QuantizedWeights:
    """Quantized copies by the weights that they are made of: made once, and anew where one of those has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies: dict[Any, tuple[list[Tensor], list[Any], QuantizedWeight]] = {}

    def of(self, parts: Sequence[Part], kind: Kind) -> QuantizedWeight:
        """The rows of these weights, one after the other. ValueError with the reason where they cannot be quantized."""
        tensors = [self.tensor(part.path) for part in parts]
        key = (kind, *((id(tensor), part.transposed) for tensor, part in zip(tensors, parts, strict=True)))
        states = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        known = self._copies.get(key)
        if known is None or known[1] != states:
            made = [
                quantize_weight(tensor.detach().t() if part.transposed else tensor, kind)
                for tensor, part in zip(tensors, parts, strict=True)
            ]
            # Their memory is held: what is put in their place could come to lie where they were, and seem the same.
            known = self._copies[key] = ([tensor.detach() for tensor in tensors], states, _joined(made))
        return known[2]

    def tensor(self, path: str) -> Tensor:
        """The weight of that path; ValueError for one of which a change would not be seen."""
        try:
            place = find_weight((self.model,), path)
        except KeyError:
            raise ValueError(f"{path} is a constant of the graph") from None
        tensor: Tensor = place.owner[place.name]
        if type(tensor) not in (nn.Parameter, Tensor):
            raise ValueError(f"{path} is a {type(tensor).__name__}, not a plain tensor")
        if tensor.is_inference():
            raise ValueError(f"{path} was made in inference mode: a change in place would not be seen")
        return tensor

    def source(self, path: str) -> tuple[WeightPlace, int]:
        """Where the weight is, and its version now."""
        place = find_weight((self.model,), path)
        return place, place.owner[place.name]._version

    def forget(self) -> None:
        self._copies.clear()


def _joined(weights: list[QuantizedWeight]) -> QuantizedWeight:
    first = weights[0]
    if len(weights) == 1:
        return first
    data, scales = (torch.cat([getattr(w, name) for w in weights]) for name in ("data", "scales"))
    return QuantizedWeight(data, scales, None, first.kind, first.group_size, (data.shape[0], first.shape[1]))
