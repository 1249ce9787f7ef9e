"""Which places of a padded batch hold real tokens, as the packed graph takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 128  # on CUDA the number of tokens is rounded up to a multiple of it: each multiple is a graph of its own


class Tokens(NamedTuple):
    """The real tokens of a padded batch, row by row.

    Attributes:
        places: (T,) int64, row * length + column of each token. A dummy's is rows * length, one past the last.
        cu_seqlens: int32, where each row's tokens start among them, and the end; dummies are sequences of their own.
        real: how many of them are no dummies.
        contiguous: whether each row's real tokens follow each other; None where nobody asked.
    """

    places: Tensor
    cu_seqlens: Tensor
    real: int
    contiguous: bool | None


def tokens_of(mask: Tensor, ask_contiguous: bool = False, step: int | None = None) -> Tokens:
    """Of a mask (B, S), nonzero for a real token. On CUDA the host waits for the device once, to learn how many there
    are (twice where `ask_contiguous`).

    There are as many dummies as make the number of tokens a multiple of `step` (128 on CUDA, 1 on the CPU), and at
    least one token.
    """
    rows, length = mask.shape
    step = step or (_STEP if mask.is_cuda else 1)
    real = mask != 0
    places = real.reshape(-1).nonzero().squeeze(1)
    count = places.shape[0]
    contiguous = None
    if ask_contiguous:
        starts = (real[:, 1:] & ~real[:, :-1]).sum(dim=1) + real[:, 0]
        contiguous = bool((starts <= 1).all())
    cu_seqlens = F.pad(real.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    wanted = max(1, -(-count // step)) * step
    if step > 1 or wanted != count:
        places = F.pad(places, (0, wanted - count), value=rows * length)
        # Sequences no longer than a row, whose length bounds them all; always as many as may ever be wanted.
        most = -(-step // length)
        ends = [min(wanted, count + (i + 1) * length) for i in range(most - 1)] + [wanted]
        cu_seqlens = torch.cat([cu_seqlens, torch.tensor(ends, dtype=torch.int32).to(mask.device)])
    return Tokens(places, cu_seqlens, count, contiguous)
