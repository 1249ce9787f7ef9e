"""Weights of matrix products in 8 or 4 bits, rounded to the nearest, for products that are bound by reading them.

Kinds, w an entry of the weight and q what is stored of it:

- "int8": `w = q * scale`, q from -127 to 127, one scale for each row (output channel).
- "fp8": the same, q a float8_e4m3fn.
- "int4": `w = (q - zero) * scale`, q from 0 to 15, one scale and zero for each group of 32, 64 or 128 columns.
  Symmetric ones have a zero of 8 everywhere, which is not stored, and a scale of either sign, such that the entry of
  the largest magnitude is -8 times it: all 16 values are used.

Columns are stored in an order that suits `burnish.kernels.widen`: two that follow each other are half a word of 32 bits
apart. So of four columns of 8 bits the middle two are swapped, and of eight of 4 bits, which are a word from its lowest
bits on, those with odd numbers follow those with even ones.

The root of the mean squared error in % of the weight's (of 512 x 4096 random normal numbers, and of MiniLM's 36
products on average), with the largest entry representable and with the scale searched:

                           normal          MiniLM
    int8                   0.87  0.86      0.92  0.92
    fp8                    2.65  2.62      2.61  2.56
    int4, 128              10.4   9.7      11.2  10.5
    int4, 128, zeros       10.1   9.5      10.7  10.1
    int4, 64               9.5    9.1      10.1   9.6
    int4, 64, zeros        9.1    8.7       9.5   9.1

So the search is worth its time for int4 only. (With a scale of one sign and 15 values it would be 11.8, 10.1, 12.7 and
11.0 for 128.) Zeros take 2 to 5% off the error (12% with the long tails of Student's t of 4 degrees) for 1.5% more
bytes, and the kernels do not take them; they are not the default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "int4", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "int4", "fp8")
GROUP_SIZES = (32, 64, 128)
MIDDLE = 8  # the zero of symmetric int4
_MULTIPLE = {"int8": 16, "fp8": 16, "int4": 128}  # of columns, that are stored together
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SHRUNK = tuple(1 - 0.025 * i for i in range(17))  # scales that the search tries; smaller ones were never the best
_AT_ONCE = 1 << 22  # entries that are quantized at a time: a few copies of them in float32 are all that it needs


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight (N, K) in fewer bits.

    Attributes:
        data: (N, K) int8 of "int8", (N, K) uint8 of "fp8", (N, K / 2) uint8 of "int4"; columns in the module's order.
        scales: (N,), or (N, K / group_size) of "int4"; float32, float16 or bfloat16.
        zeros: (N, K / group_size) uint8, or None where nothing is to be subtracted but the middle.
        kind: "int8", "int4" or "fp8".
        group_size: columns that share a scale: K but for "int4".
        shape: (N, K).
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    kind: Kind
    group_size: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that a product by this one is a product by."""
        return dequantize(self.data, self.scales, self.zeros, self.kind, dtype)


def quantize_weight(
    weight: Tensor,
    kind: Kind = "int8",
    group_size: int = 128,
    *,
    symmetric: bool = True,
    search: bool | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """The weight (N, K) of any floating dtype in 8 or 4 bits, on the device where it is.

    `group_size` and `symmetric` are for "int4". `search` tries 17 scales for each row or group and takes that of the
    least squared error; None: for "int4" only, see the module's docstring. `scale_dtype` None: float32 for rows, the
    weight's dtype for groups (float32 for float64), whose scales would be a tenth of the bytes in float32. Scales are
    rounded to it before the entries are rounded by them.

    Errors: ValueError for an unknown kind or group size, a weight that is not (N, K) or not finite, K that is no
    multiple of what is stored together (16, of int4 128); TypeError for a dtype that is not floating.
    """
    _check(weight, kind, group_size)
    rows, columns = weight.shape
    if scale_dtype is None:
        narrow = kind == "int4" and weight.dtype in (torch.float16, torch.bfloat16)
        scale_dtype = weight.dtype if narrow else torch.float32
    group = group_size if kind == "int4" else columns
    tried = _SHRUNK if (kind == "int4" if search is None else search) else (1.0,)
    parts = []
    for part in weight.detach().split(max(1, _AT_ONCE // columns)):
        grouped = part.float().view(len(part), columns // group, group)
        scales, zeros = _scales(grouped, kind, symmetric, tried, scale_dtype)
        parts.append((_pack(_rounded(grouped, scales, zeros, kind).flatten(1), kind), scales[..., 0], zeros[..., 0]))
    data, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    whole = QuantizedWeight(data, scales.to(scale_dtype), zeros.to(torch.uint8), kind, group, (rows, columns))
    if kind != "int4":
        return replace(whole, scales=whole.scales[:, 0], zeros=None)
    return replace(whole, zeros=None) if symmetric else whole


def dequantize(
    data: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight (N, K) that `quantize_weight` stored as this: computed in float32 (float64 for float64), rounded."""
    # What is stored is exact in any of these dtypes; the product by the scale is computed in the wider one's.
    entries = _unpack(data, kind, dtype)
    if kind != "int4":
        return entries.mul_(scales[:, None])
    grouped = entries.view(*scales.shape, entries.shape[1] // scales.shape[1])
    grouped -= MIDDLE if zeros is None else zeros[..., None]
    grouped *= scales[..., None]
    return entries


def dequantize_rows(
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `start:stop` of that weight."""
    rows = slice(start, stop)
    return dequantize(data[rows], scales[rows], None if zeros is None else zeros[rows], kind, dtype)


def columns_of(data: Tensor, kind: str) -> int:
    """K of a weight that is stored as `data`."""
    return data.shape[1] * 2 if kind == "int4" else data.shape[1]


def _check(weight: Tensor, kind: str, group_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; it must be a floating-point tensor")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (N, K), neither of them 0")
    if kind == "int4" and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}")
    if weight.shape[1] % _MULTIPLE[kind]:
        raise ValueError(
            f"weight has {weight.shape[1]} columns; of {kind} {_MULTIPLE[kind]} are stored together, so they must be a "
            "multiple of that"
        )
    if not weight.isfinite().all():
        raise ValueError("weight has entries that are not finite")


def _scales(
    grouped: Tensor, kind: str, symmetric: bool, tried: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, (N, groups, 1) in float32, the scale a number of `dtype`."""
    if kind != "int4":
        full = grouped.abs().amax(-1, keepdim=True) / _LARGEST[kind]
    elif symmetric:
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        full = torch.where(-low >= high, low, high) / -MIDDLE
    else:
        low, high = grouped.amin(-1, keepdim=True).clamp_max_(0), grouped.amax(-1, keepdim=True).clamp_min_(0)
        full = (high - low) / 15
    candidates = []
    for factor in tried:
        scale = (full * factor).to(dtype).float()
        scale = scale.masked_fill_(scale == 0, 1)  # of nothing but zeros
        zero = torch.full_like(scale, MIDDLE if kind == "int4" else 0)
        if kind == "int4" and not symmetric:
            zero = (-low * factor / scale).round_().clamp_(0, 15)
        candidates.append((scale, zero))
    if len(candidates) == 1:
        return candidates[0]
    errors = [
        ((_rounded(grouped, scale, zero, kind) - zero) * scale - grouped).square_().sum(-1, keepdim=True)
        for scale, zero in candidates
    ]
    best = torch.stack(errors).argmin(0, keepdim=True)
    scales, zeros = (torch.stack(numbers).gather(0, best)[0] for numbers in zip(*candidates, strict=True))
    return scales, zeros


def _rounded(grouped: Tensor, scales: Tensor, zeros: Tensor, kind: str) -> Tensor:
    """What is stored of each entry, as float32."""
    entries = grouped / scales
    if kind == "int4":
        return entries.add_(zeros).round_().clamp_(0, 15)
    largest = _LARGEST[kind]
    entries = entries.clamp_(-largest, largest)
    return entries.round_() if kind == "int8" else entries.to(torch.float8_e4m3fn).float()


def _pack(entries: Tensor, kind: str) -> Tensor:
    """(N, K) of such numbers, as they are stored."""
    rows, columns = entries.shape
    if kind == "int4":
        bits = entries.to(torch.uint8).view(rows, columns // 8, 4, 2).transpose(2, 3).reshape(rows, columns // 2, 2)
        return bits[..., 0] | bits[..., 1] << 4
    bits = entries.to(torch.int8) if kind == "int8" else entries.to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.view(rows, columns // 4, 2, 2).transpose(2, 3).reshape(rows, columns)


def _unpack(data: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The numbers (N, K) of such storage, in columns' order: put in order and converted in one pass."""
    rows, width = data.shape
    if kind == "int4":
        stored = torch.stack((data & 15, data >> 4), dim=-1).view(rows, width // 4, 2, 4).transpose(2, 3)
    else:
        entries = data if kind == "int8" else data.view(torch.float8_e4m3fn)
        stored = entries.reshape(rows, width // 4, 2, 2).transpose(2, 3)
    ordered = torch.empty(stored.shape, dtype=dtype, device=data.device)
    return ordered.copy_(stored).flatten(1)
