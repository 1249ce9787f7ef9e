"""Embeddings: rows of one to three tables gathered and added in one pass, BERT's also layer-normalized.

Source: Devlin et al., "BERT", arXiv:1810.04805; the normalization as in `burnish.kernels.norms`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import (
    Config,
    Target,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    target_of,
    wait_for_inputs,
)
from burnish.kernels.norms import load_vector, norm_configs, normalize


@triton.jit
def _gather(table, entries, stride, ids, batch, position, ids_batch, ids_step, column, N: tl.constexpr):
    """The row of `table` that the index names, (1, block); NaN where there is no such row, so that it is seen."""
    index = tl.load(ids + batch * ids_batch + position * ids_step).to(tl.int64)
    found = tl.where((index >= 0) & (index < entries), N, 0)
    return tl.load(table + index * stride + column, column < found, other=float("nan"))


@triton.jit(
    do_not_specialize=["length", "ids_batch", "position_ids_batch", "type_ids_batch"],
    do_not_specialize_on_alignment=["live"],
)
def _embedding_layer_norm_kernel(
    ids, word, position_ids, position, type_ids, type, weight, bias, out, length,
    ids_batch, ids_step, position_ids_batch, position_ids_step, type_ids_batch, type_ids_step,
    words, word_stride, positions, position_stride, types, type_stride, weight_step, bias_step, eps, live,
    N: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each token."""
    launch_dependents(PDL)
    scale, shift = None, None
    if weight is not None:
        scale = load_vector(weight, weight_step, N, BLOCK_N).to(tl.float32)
    if bias is not None:
        shift = load_vector(bias, bias_step, N, BLOCK_N).to(tl.float32)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    if live is not None:
        wanted = tl.load(live)
        if row >= wanted:
            return
    batch, place = row // length, row % length
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = column < N
    dtype = out.dtype.element_ty
    total = _gather(word, words, word_stride, ids, batch, place, ids_batch, ids_step, column, N)
    added = _gather(
        position, positions, position_stride, position_ids, batch, place,
        position_ids_batch, position_ids_step, column, N,
    )  # fmt: skip
    if type is not None:
        kind = _gather(type, types, type_stride, type_ids, batch, place, type_ids_batch, type_ids_step, column, N)
        total = (total.to(tl.float32) + kind.to(tl.float32)).to(dtype)
    total = (total.to(tl.float32) + added.to(tl.float32)).to(dtype)
    normed = normalize(tl.where(mask, total.to(tl.float32), 0.0), mask, eps, N, False)
    if weight is not None:
        normed = normed * scale
    if bias is not None:
        normed = normed + shift
    tl.store(out + row * N + column, normed.to(dtype), mask)


@triton.jit(do_not_specialize=["length", "ids_batch", "position_ids_batch"], do_not_specialize_on_alignment=["live"])
def _embedding_kernel(
    ids, word, position_ids, position, out, length, ids_batch, ids_step, position_ids_batch, position_ids_step,
    words, word_stride, positions, position_stride, live, N: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of one token."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    if live is not None:
        wanted = tl.load(live)
        if row >= wanted:
            return
    batch, place = row // length, row % length
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    total = _gather(word, words, word_stride, ids, batch, place, ids_batch, ids_step, column, N)
    if position is not None:
        added = _gather(
            position, positions, position_stride, position_ids, batch, place,
            position_ids_batch, position_ids_step, column, N,
        )  # fmt: skip
        total = total.to(tl.float32) + added.to(tl.float32)
    tl.store(out + row * N + column, total.to(out.dtype.element_ty), column < N)


def embedding(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor | None,
    position: Tensor | None,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """`word[ids]`, and `position[position_ids]` added where given, rounded once.

    Shapes, dtypes, what is out of range and `live_rows` as of `embedding_layer_norm`.
    """
    B, S = ids.shape
    N = word.shape[1]
    config = config or first_config(lookup_configs, N)
    out = torch.empty((B, S, N), dtype=word.dtype, device=word.device)
    launch(
        _embedding_kernel, (B * S, cdiv(N, config["BLOCK_N"])), ids, word, position_ids, position, out, S,
        *_steps(ids, position_ids), *_sizes(word, position), live_rows, config=config, like=word, N=N,
    )  # fmt: skip
    return out


def lookup_configs(N: int) -> list[Config]:
    """How to look up rows of N entries, the most promising first."""
    widest = max(128, next_power_of_2(N))
    return list(dict.fromkeys(Config.of(w, BLOCK_N=min(n, widest)) for n, w in ((512, 2), (1024, 4), (256, 1))))


def _steps(*indices: Tensor | None) -> list[int]:
    """Strides of each: 0 of a dimension that is the same for all."""
    return [s for i in indices for s in ((0, 0) if i is None else (i.stride(0) if i.shape[0] > 1 else 0, i.stride(1)))]


def _sizes(*tables: Tensor | None) -> list[int]:
    """Of each the entries, and how far they are apart."""
    return [s for t in tables for s in ((0, 0) if t is None else (t.shape[0], t.stride(0)))]


def embedding_layer_norm(
    ids: Tensor, word: Tensor, position_ids: Tensor, position: Tensor, type_ids: Tensor | None, type: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float, config: Config | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`layer_norm(word[ids] + type[type_ids] + position[position_ids])`, rounded after each addition.

    Shapes: ids (B, S), position_ids and type_ids (B or 1, S), of any strides; the tables (entries, N), the last stride
    1; weight and bias (N,) or None; the result (B, S, N). Dtypes: indices int32 or int64; the tables one of float16,
    bfloat16, float32, which is the result's; weight and bias each their own. An index that is out of range gives NaN.
    Tokens of the result from `live_rows` on, an int32 on the device, are left as they are.
    """
    B, S = ids.shape
    N = word.shape[1]
    config = config or first_config(embedding_configs, B * S, N, word.dtype, target_of(word))
    out = torch.empty((B, S, N), dtype=word.dtype, device=word.device)
    vector_steps = (1 if v is None else v.stride(0) for v in (weight, bias))
    launch(
        _embedding_layer_norm_kernel, (B * S,), ids, word, position_ids, position, type_ids, type, weight, bias, out, S,
        *_steps(ids, position_ids, type_ids), *_sizes(word, position, type), *vector_steps, eps, live_rows,
        config=config, like=word, N=N, BLOCK_N=next_power_of_2(N),
    )  # fmt: skip
    return out


def embedding_configs(rows: int, N: int, dtype: torch.dtype, target: Target) -> list[Config]:
    """How to embed `rows` tokens of N entries, the most promising first: the warps that one row takes."""
    rows_alone = [c.num_warps for c in norm_configs(min(rows, target.num_sms), N, dtype, True, target)]
    return [Config.of(num_warps=num_warps) for num_warps in dict.fromkeys(rows_alone)]
