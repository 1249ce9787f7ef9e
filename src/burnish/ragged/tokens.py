"""Which places of a padded batch hold real tokens, as the packed graph takes it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from burnish.ops._triton import triton_why_not

_STEP = 128  # on CUDA, where the host counts tokens, their number is rounded up to a multiple: each has its graph


class Tokens(NamedTuple):
    """The real tokens of a padded batch, row by row; the packed graph takes all but the last two.

    Attributes:
        places: (T,) int64, row * length + column of each token. A dummy's is rows * length, one past the last.
        nearest: (T,) int64, the same, but for a dummy the last place: to read at.
        columns: (T,) int64, that of `nearest`.
        cu_seqlens: int32, where each row's tokens start among them, and the end; dummies are sequences of their own,
            but for tokens of all places, where they are in none.
        sources: (rows * length,) int32, which token is at each place, -1 at padding; None where no kernel reads it.
        real: how many of them are no dummies; None where the host does not know.
        contiguous: whether each row's real tokens follow each other; None where nobody asked.
    """

    places: Tensor
    nearest: Tensor
    columns: Tensor
    cu_seqlens: Tensor
    sources: Tensor | None
    real: int | None
    contiguous: bool | None


INPUTS = ("places", "nearest", "columns", "cu_seqlens", "sources")
"""What the packed graph takes of Tokens, in order."""


class TokenMemory:
    """Where the tokens of masks like `mask` are written, call after call, so that a CUDA graph finds them. What reads
    them there must be done, or be on the same stream, before the next ones are written.

    Args:
        step: the number of tokens is rounded up to a multiple of it; None for as many as there are places, whatever
            the mask, so that the host need not wait to learn how many are real.
    """

    def __init__(self, mask: Tensor, step: int | None = _STEP) -> None:
        rows, length = mask.shape
        most = rows * length if step is None else -(-rows * length // step) * step
        with torch.inference_mode(False):  # whoever is in it now, others may not be
            self.places, self.nearest, self.columns = torch.empty((3, most), dtype=torch.int64, device=mask.device)
            sizes = [rows + 1 + (0 if step is None else -(-step // length)), rows * length]
            self.cu_seqlens, self.sources = (torch.empty(n, dtype=torch.int32, device=mask.device) for n in sizes)
            # The kernel writes to the host's memory: to copy two numbers there would take as long as to find them.
            self.found = None if step is None else torch.empty(2, dtype=torch.int32, pin_memory=mask.is_cuda)
        self.step = step
        self.all_places = Tokens(self.places, self.nearest, self.columns, self.cu_seqlens, self.sources, None, None)
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def find(self, mask: Tensor, ask_contiguous: bool = False) -> Tokens:
        """By a kernel. On CUDA the host waits for the device once, but for tokens of all places."""
        from burnish.kernels.tokens import find_tokens

        of_tokens = (self.places, self.nearest, self.columns)
        find_tokens(mask, *of_tokens, self.cu_seqlens, self.sources, self.found, self.step, ask_contiguous)
        if self.step is None or self.found is None:  # there is room for all places: the host need not know how many
            return self.all_places
        if mask.is_cuda:
            torch.cuda.current_stream(mask.device).synchronize()
        real, gaps = self.found.tolist()
        wanted = max(1, -(-real // self.step)) * self.step
        if wanted not in self._views:  # to slice three tensors takes 5 us
            self._views[wanted] = (self.places[:wanted], self.nearest[:wanted], self.columns[:wanted])
        contiguous = gaps == 0 if ask_contiguous else None
        return Tokens(*self._views[wanted], self.cu_seqlens, self.sources, real, contiguous)

    def count(self) -> int:
        """How many of the last mask's tokens are real, where there is room for all places. The host waits for the
        device."""
        if self.cu_seqlens.is_cuda:
            torch.cuda.synchronize(self.cu_seqlens.device)
        return int(self.cu_seqlens[-1])


def tokens_of(
    mask: Tensor, ask_contiguous: bool = False, step: int | None = None, memory: TokenMemory | None = None
) -> Tokens:
    """Of a mask (B, S), nonzero for a real token. On CUDA the host waits for the device once, to learn how many there
    are.

    There are as many dummies as make the number of tokens a multiple of `step` (128 on CUDA, 1 on the CPU), and at
    least one token.

    Args:
        memory: for masks of this shape, where the tokens are to be written; without it, in memory of their own.
    """
    if memory is not None:
        return memory.find(mask, ask_contiguous)
    step = step or (_STEP if mask.is_cuda else 1)
    if has_kernel(mask):
        return TokenMemory(mask, step).find(mask, ask_contiguous)
    rows, length = mask.shape
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
    nearest = places.clamp_max(rows * length - 1)
    return Tokens(places, nearest, nearest % length, cu_seqlens, None, count, contiguous)


def has_kernel(mask: Tensor) -> bool:
    """Whether a kernel of ours finds the tokens: on CUDA, where Triton runs."""
    return mask.is_cuda and mask.numel() > 0 and _runs_triton(mask.device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return not triton_why_not(torch.empty(1, device=device))


def take(nearest: Tensor, columns: Tensor, sources: Sequence[Tensor], by_column: Sequence[bool]) -> Sequence[Tensor]:
    """Of each source, an int64 vector, what is at every token's place, or column where `by_column`: (T,) each."""
    if has_kernel(nearest) and not isinstance(nearest, FakeTensor):
        from burnish.kernels.tokens import MOST_TAKEN
        from burnish.kernels.tokens import take as by_kernel

        if len(sources) <= MOST_TAKEN:
            return by_kernel(nearest, columns, sources, by_column).unbind()
    index = (columns if by else nearest for by in by_column)
    return tuple(source.index_select(0, places) for source, places in zip(sources, index, strict=True))


def put_back(packed: Tensor, places: Tensor, sources: Tensor | None, rows: int, length: int) -> Tensor:
    """Packed tokens (T, ...) back in their places, zeros elsewhere: (rows, length, ...)."""
    shape: Sequence[Any] = [rows, length, *packed.shape[1:]]
    needs_gradients = torch.is_grad_enabled() and packed.requires_grad
    if (
        sources is not None
        and not needs_gradients
        and not isinstance(packed, FakeTensor)
        and not triton_why_not(packed)
    ):
        from burnish.kernels.tokens import put_back as by_kernel

        return by_kernel(packed, sources).view(shape)
    if sources is not None and not needs_gradients:
        indices, rest = sources.clamp_min(0), packed.shape[1:]  # dummies of all places hold nothing that is defined
        whole = packed.index_select(0, indices).masked_fill_((sources < 0).view(-1, *(1,) * len(rest)), 0)
        return whole.view(shape)
    whole = packed.new_zeros([rows * length + 1, *packed.shape[1:]])  # one more, for dummies
    return whole.index_copy_(0, places, packed)[:-1].view(shape)
