"""A model's first step: the rows of its vocabulary, and of its positions, that tokens stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes
from burnish.ops._embeddings import check_lookups, stored_by_rows
from burnish.ops._triton import triton_why_not
from burnish.ops.embedding_backward import embedding_backward


def _check(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> None:
    if (position_ids is None) != (position is None):
        raise ValueError("position_ids and position belong together; give both or none")
    check_lookups(ids, word, {"position_ids": position_ids}, {"position": position})


def _cost(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> Cost:
    width = word.shape[1]
    rows = ids.numel() + (0 if position_ids is None else position_ids.numel())
    moved = (rows + ids.numel()) * width * word.element_size() + nbytes(ids, position_ids)
    return Cost((1 if position is None else 2) * ids.numel() * width, moved)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def table(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def index(*shape: int, below: int, seed: int) -> Tensor:
        return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(device)

    word, position = table(1000, 384, seed=0), table(512, 384, seed=1)
    yield Sample("one token", (index(1, 1, below=1000, seed=2), word))
    yield Sample("one token of each text", (index(5, 1, below=1000, seed=3), word))
    yield Sample("positions", (index(3, 7, below=1000, seed=4), word, torch.arange(7, device=device)[None], position))
    each = index(3, 1, below=512, seed=5).int()
    yield Sample("a position of each", (index(3, 1, below=1000, seed=6), word, each, position))
    yield Sample("odd width", (index(2, 3, below=50, seed=7), table(50, 1333, seed=8)))


def _shape(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> Tensor:
    return word.new_empty((*ids.shape, word.shape[1]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def embedding(ids: Tensor, word: Tensor, position_ids: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """`word[ids]`, or `word[ids] + position[position_ids]`.

    Shapes: ids (B, S); position_ids (B or 1, S); the tables word and position (entries, N); the result (B, S, N),
    contiguous. Without positions, both position_ids and position are None.
    Dtypes: indices int32 or int64; the tables the same floating one, which is the result's.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes; an index out of range as F.embedding does.
    Source: the order of Hugging Face's GPT2Model (Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019) and LlamaModel.
    """
    total = F.embedding(ids, word)
    if position_ids is not None and position is not None:
        total = total + F.embedding(position_ids, position)
    return total


@embedding.impl("torch", differentiable=True)
def _torch(ids: Tensor, word: Tensor, position_ids: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """F.embedding of each table, the second added in place."""
    total = F.embedding(ids, word)
    if position_ids is not None and position is not None:
        total.add_(F.embedding(position_ids, position))
    return total


def _triton_why_not(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> list[str]:
    reasons = triton_why_not(word)
    if ids.numel() == 0:
        reasons.append("ids is empty")
    return reasons + stored_by_rows(word=word, position=position)


def _triton_configs(ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None) -> list[Any]:
    from burnish.kernels.embedding import lookup_configs

    return lookup_configs(word.shape[1])


@embedding.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    ids: Tensor,
    word: Tensor,
    position_ids: Tensor | None = None,
    position: Tensor | None = None,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """Rows gathered and added in one pass, several programs for each token."""
    from burnish.kernels import embedding

    return embedding.embedding(ids, word, position_ids, position, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    ids: Tensor, word: Tensor, position_ids: Tensor | None, position: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Keeps no rows: of the tables, which live anyway, only the sizes are needed."""
    args = ids, word, position_ids, position
    return embedding(*args), args


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    ids, word, position_ids, position = saved.kept
    dword = dposition = None
    if grad is not None and saved.needed[1]:
        dword = embedding_backward(grad, ids, word.shape[0])
    if grad is not None and saved.needed[3]:
        if position_ids.shape[0] != ids.shape[0]:
            grad = grad.sum(0, keepdim=True)
        dposition = embedding_backward(grad, position_ids, position.shape[0])
    return None, dword, None, dposition


embedding.differentiate(_forward, _backward)
