"""The tables of rotary position embedding: cosines and sines of positions times frequencies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, check_floating, nbytes, wide
from burnish.ops._triton import triton_why_not

# A name and not a torch.dtype, which torch.export takes as no input of a program.
_DTYPES = {str(dtype)[6:]: dtype for dtype in (*HALF_TYPES, torch.float32, torch.float64)}


def _check(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> None:
    if position_ids.dim() not in (1, 2):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; it must be (S,) or (1 or B, S)")
    if not position_ids.is_floating_point() and position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids has dtype {position_ids.dtype}; it must be int32, int64 or floating")
    check_floating("inv_freq", inv_freq)
    if inv_freq.dim() != 1:
        raise ValueError(f"inv_freq has shape {tuple(inv_freq.shape)}; it must be (D / 2,)")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")


def _result_dtype(inv_freq: Tensor, dtype: str) -> torch.dtype:
    """float64 for frequencies of float64: so the reference, given all in float64, is its own oracle."""
    return torch.float64 if inv_freq.dtype == torch.float64 else _DTYPES[dtype]


def _cost(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> Cost:
    angles = position_ids.numel() * inv_freq.numel()
    written = 4 * angles * _result_dtype(inv_freq, dtype).itemsize
    return Cost(5 * angles, nbytes(position_ids, inv_freq) + written)  # the angle, cosine and sine, and two scalings


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    name = str(dtype)[6:]

    def frequencies(width: int, base: float = 10000.0) -> Tensor:
        return (base ** (-torch.arange(0, width, 2) / width)).to(device, dtype)

    def positions(*shape: int, first: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(first, first + count, device=device).view(shape).to(dtype)

    each = torch.tensor([[0], [4000]], device=device) + positions(17)
    yield Sample("one token", (positions(1, 1, first=1000), frequencies(128), name))
    yield Sample("odd", (positions(1, 17), frequencies(20), name))
    yield Sample("positions for each, scaled", (each, frequencies(64), name, 1.25))
    yield Sample("one dimension", (positions(9), frequencies(32), name))
    yield Sample("the last of 131072", (positions(1, 24, first=131048), frequencies(128, 500000.0), name))
    yield Sample("transposed", (each.t().contiguous().t(), frequencies(40), name))
    yield Sample("expanded", (positions(1, 5).expand(3, 5), frequencies(64)[::2], name))
    yield Sample("float positions", (positions(2, 7, dtype=torch.float32) / 4, frequencies(32), name, 0.5))
    yield Sample("int32 positions, float32 tables", (positions(2, 7, dtype=torch.int32), frequencies(32), "float32"))
    yield Sample("1x2048x128", (positions(1, 2048), frequencies(128), name))


def _shape(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> tuple[Tensor, Tensor]:
    shape = (*position_ids.shape, 2 * inv_freq.shape[0])
    result = _result_dtype(inv_freq, dtype)
    return inv_freq.new_empty(shape, dtype=result), inv_freq.new_empty(shape, dtype=result)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rope_tables(
    position_ids: Tensor, inv_freq: Tensor, dtype: str = "float32", scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of the angles `position * inv_freq`, twice side by side, times `scaling`: `(cos, sin)`.

    Shapes: position_ids (S,) or (1 or B, S); inv_freq (D / 2,). The results are (S, D) or (1 or B, S, D), contiguous,
    as `rope` takes them for rotation by halves.
    Dtypes: position_ids int32, int64 or floating; inv_freq floating; `dtype` names the results': float16, bfloat16,
    float32 or float64. Computed in float32, rounded once. Frequencies of float64 give results of float64, computed in
    it, whatever `dtype` says.
    Errors: ValueError for sizes that do not fit and for another dtype's name, TypeError for dtypes.
    Source: Su et al., "RoFormer", arXiv:2104.09864, as Hugging Face's LlamaRotaryEmbedding has it; the scaling is
    YaRN's (Peng et al., arXiv:2309.00071).
    """
    angles = _angles(position_ids, inv_freq)
    angles, result = torch.cat((angles, angles), dim=-1), _result_dtype(inv_freq, dtype)
    return (angles.cos() * scaling).to(result), (angles.sin() * scaling).to(result)


def _angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    computed_in = wide(inv_freq.dtype)
    return position_ids[..., None].to(computed_in) * inv_freq.to(computed_in)


@rope_tables.impl("torch", differentiable=True)
def _torch(
    position_ids: Tensor, inv_freq: Tensor, dtype: str = "float32", scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each angle once; repeated when they are scaled and rounded."""
    angles, result = _angles(position_ids, inv_freq), _result_dtype(inv_freq, dtype)
    cos, sin = (table if scaling == 1 else table * scaling for table in (angles.cos(), angles.sin()))
    cos, sin = cos.to(result), sin.to(result)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


_MAX_WIDTH = 1024  # as in burnish.kernels.rope_tables, which needs triton


def _triton_why_not(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> list[str]:
    reasons = triton_why_not(inv_freq)
    if 2 * inv_freq.shape[0] > _MAX_WIDTH:
        reasons.append(f"the tables have {2 * inv_freq.shape[0]} columns; the kernel takes up to {_MAX_WIDTH}")
    if position_ids.numel() == 0:
        reasons.append("position_ids is empty")
    if position_ids.dtype == torch.float64:
        reasons.append("position_ids is torch.float64; the kernel computes in float32")
    if dtype == "float64":
        reasons.append("the tables are to be float64; the kernel writes float16, bfloat16 and float32")
    return reasons


def _triton_configs(position_ids: Tensor, inv_freq: Tensor, dtype: str, scaling: float) -> list[Any]:
    from burnish.kernels.rope_tables import rope_tables_configs

    return rope_tables_configs(position_ids, inv_freq)


@rope_tables.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    position_ids: Tensor, inv_freq: Tensor, dtype: str = "float32", scaling: float = 1.0, *, config: Any = None
) -> tuple[Tensor, Tensor]:
    """One launch, each angle once."""
    from burnish.kernels.rope_tables import rope_tables as make_tables

    return make_tables(position_ids, inv_freq, _DTYPES[dtype], scaling, config)
