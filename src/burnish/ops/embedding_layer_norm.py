"""BERT's embeddings: words, positions and token types summed and normalized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_vector, nbytes
from burnish.ops._embeddings import check_lookups, stored_by_rows
from burnish.ops._norms import layer_norm_reference, not_mixed_layer_norm
from burnish.ops._triton_norms import triton_norm_why_not
from burnish.ops.embedding import embedding
from burnish.ops.layer_norm import layer_norm


def _check(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    if (type_ids is None) != (type is None):
        raise ValueError("type_ids and type belong together; give both or none")
    indices, tables = {"position_ids": position_ids, "type_ids": type_ids}, {"position": position, "type": type}
    check_lookups(ids, word, indices, tables)
    check_vector("weight", weight, word.shape[1], "the embeddings' width")
    check_vector("bias", bias, word.shape[1], "the embeddings' width")


def _cost(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Cost:
    width, size = word.shape[1], word.element_size()
    rows = ids.numel() + position_ids.numel() + (0 if type_ids is None else type_ids.numel())
    moved = (rows + ids.numel()) * width * size + nbytes(ids, position_ids, type_ids, weight, bias)
    return Cost((8 + (1 if type is None else 2)) * ids.numel() * width, moved)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def index(*shape: int, below: int, seed: int) -> Tensor:
        return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(device)

    word, position, types = tensor(1000, 384, seed=0), tensor(512, 384, seed=1), tensor(2, 384, seed=2)
    weight, bias = tensor(384, seed=3), tensor(384, seed=4)
    ids, positions = index(2, 33, below=1000, seed=5), torch.arange(33, device=device)[None]
    type_ids = index(2, 33, below=2, seed=6)
    yield Sample("BERT", (ids, word, positions, position, type_ids, types, weight, bias, 1e-12))
    yield Sample("one type for all", (ids, word, positions, position, type_ids[:1], types, weight, bias))
    yield Sample("no types", (ids, word, positions, position, None, None, weight, bias))
    yield Sample("positions per row", (ids, word, index(2, 33, below=512, seed=7), position, None, None, weight, None))
    yield Sample("expanded types", (ids, word, positions, position, type_ids[:1].expand(2, 33), types, weight, bias))


def _shape(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    return word.new_empty((*ids.shape, word.shape[1]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def embedding_layer_norm(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None = None,
    type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """`layer_norm(word[ids] + type[type_ids] + position[position_ids])`.

    Shapes: ids (B, S); position_ids and type_ids (B or 1, S); the tables word, position and type (entries, N); weight
    and bias (N,) or None; the result (B, S, N), contiguous. Without types, both type_ids and type are None.
    Dtypes: indices int32 or int64; the tables the same floating one, which is the result's; weight and bias may differ.
    The sum is rounded after each addition; normalized in float32 (float64 for float64), rounded once.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes; an index out of range as F.embedding does.
    Source: Devlin et al., "BERT", arXiv:1810.04805, and the order of Hugging Face's BertEmbeddings.
    """
    total = F.embedding(ids, word)
    if type_ids is not None and type is not None:
        total = total + F.embedding(type_ids, type)
    return layer_norm_reference(total + F.embedding(position_ids, position), weight, bias, eps)


def _torch_why_not(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[str]:
    return not_mixed_layer_norm(word, weight, bias)


@embedding_layer_norm.impl("torch", why_not=_torch_why_not, differentiable=True)
def _torch(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None = None,
    type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """The words' rows gathered once, the rest added in place, and PyTorch's own layer norm."""
    total = F.embedding(ids, word)
    if type_ids is not None and type is not None:
        total.add_(F.embedding(type_ids, type))
    total.add_(F.embedding(position_ids, position))
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def _triton_why_not(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[str]:
    reasons = triton_norm_why_not(word, weight, bias)
    if ids.numel() == 0:
        reasons.append("ids is empty")
    reasons += stored_by_rows(word=word, position=position, type=type)
    return reasons


def _triton_configs(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None,
    type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[Any]:
    from burnish.kernels.embedding import embedding_configs
    from burnish.kernels.launch import target_of

    return embedding_configs(ids.numel(), word.shape[1], word.dtype, target_of(word))


@embedding_layer_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None = None,
    type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """Rows gathered, added and normalized in one pass, a program for each token."""
    from burnish.kernels import embedding

    tables = (ids, word, position_ids, position, type_ids, type)
    return embedding.embedding_layer_norm(*tables, weight, bias, eps, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor,
    position: Tensor,
    type_ids: Tensor | None = None,
    type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    total = embedding(ids, word, type_ids, type) + embedding(position_ids, position)
    out: Tensor = layer_norm(total, weight, bias, eps)
    return out


embedding_layer_norm.compose(_parts)
