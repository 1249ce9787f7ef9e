"""Logits of tokens that are there already, made less likely, or more."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, nbytes
from burnish.ops._triton import triton_why_not


def _check(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (batch, vocabulary)")
    if tokens.dim() != 2 or tokens.shape[0] != logits.shape[0]:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be ({logits.shape[0]}, positions)")
    for name, numbers in (("tokens", tokens), ("length", length), ("start", start)):
        if numbers is not None and numbers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {numbers.dtype}; it must be int32 or int64")
    for name, number in (("length", length), ("start", start)):
        if number is not None and (number.dim() > 1 or number.numel() not in (1, logits.shape[0])):
            raise ValueError(f"{name} has shape {tuple(number.shape)}; it must be one number, or one for each row")
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty is {penalty}; it must be above 0 (1 changes nothing)")


def _cost(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None) -> Cost:
    return Cost(2 * tokens.numel(), 2 * nbytes(logits) + nbytes(tokens))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def given(rows: int, size: int, most: int, seed: int, integers: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(size, (rows, most), generator=generator).to(device, integers)
        return randn(rows, size, dtype=dtype, device=device, seed=seed), tokens

    def numbers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values if len(values) > 1 else values[0], device=device, dtype=dtype)

    yield Sample("1x32000 of 2048", (*given(1, 32000, 2048, 0), numbers(1500), 1.2))
    yield Sample("odd", (*given(3, 1001, 37, 1), numbers(20), 1.3))
    yield Sample("duplicates", (*given(2, 5, 300, 2), numbers(290), 1.7))
    yield Sample("a length for each", (*given(3, 500, 100, 3), numbers(100, 0, 7), 1.2))
    yield Sample("left padding", (*given(3, 500, 100, 4), numbers(60), 1.2, numbers(0, 59, 60)))
    yield Sample(
        "one start", (*given(2, 500, 100, 5, torch.int32), numbers(60, 70, dtype=torch.int32), 0.8, numbers(5))
    )
    yield Sample("more than fits", (*given(2, 500, 40, 6), numbers(1000), 0.5))
    logits, tokens = given(2, 700, 64, 7)
    yield Sample("transposed", (logits.t().contiguous().t(), tokens.t().contiguous().t(), numbers(30), 1.1))
    beyond = tokens.clone()
    beyond[:, ::3], beyond[:, 1::5] = 700, -1
    yield Sample("tokens beyond the vocabulary", (logits, beyond, numbers(64), 1.1))


def _shape(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def penalize_repetition(
    logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None = None
) -> Tensor:
    """`logits`, those of the tokens there already divided by the penalty, or, where negative, multiplied by it.

    Shapes: logits (B, V), tokens (B, Lmax); length one number, or (B,): how many positions are filled (more than Lmax
    counts as Lmax); start the same, or None: the first position that counts, past a left padding. The result is (B, V),
    contiguous. A token that is there often counts once; one that is not from 0 to V - 1 does not count.
    Dtypes: logits floating, the result's; tokens, length and start int32 or int64.
    Errors: ValueError for shapes and for a penalty not above 0, TypeError for dtypes.
    Source: Keskar et al., "CTRL", arXiv:1909.05858, as Hugging Face's RepetitionPenaltyLogitsProcessor has it.
    """
    size = logits.shape[1]
    index = torch.where(_counts(tokens, length, start, size), tokens, size).long()
    there = torch.zeros(logits.shape[0], size + 1, dtype=torch.bool, device=logits.device).scatter(1, index, True)
    return torch.where(there[:, :size], _penalized(logits, penalty), logits).contiguous()


def _counts(tokens: Tensor, length: Tensor, start: Tensor | None, size: int) -> Tensor:
    """Which positions count, (B, Lmax)."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    counts = (position < length.reshape(-1, 1)) & (tokens >= 0) & (tokens < size)
    return counts if start is None else counts & (position >= start.reshape(-1, 1))


def _penalized(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits < 0, logits * penalty, logits / penalty)


@penalize_repetition.impl("torch")
def _torch(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
    """Computes only where tokens are, and scatters into a copy that has a column for those that do not count."""
    size = logits.shape[1]
    index = torch.where(_counts(tokens, length, start, size), tokens, size).long()
    padded = torch.nn.functional.pad(logits, (0, 1))
    padded = padded.scatter(1, index, _penalized(padded.gather(1, index), penalty))
    return padded[:, :size].contiguous()


def _triton_why_not(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None) -> list[str]:
    return triton_why_not(logits) + (["tokens is empty"] if tokens.numel() == 0 else [])


@penalize_repetition.impl("triton", why_not=_triton_why_not)
def _triton(logits: Tensor, tokens: Tensor, length: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
    """A copy, and a Triton kernel that writes where tokens are; the length stays on the device."""
    from burnish.kernels.sample import penalize_repetition

    return penalize_repetition(logits, tokens, length, penalty, start)
