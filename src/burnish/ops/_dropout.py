"""Dropout that can be replayed: which attention weights are dropped is a function of a seed and of their place.

The random words are those of Philox-4x32-10, a generator that counts: what it gives for one counter needs no other, so
that a kernel which never has all weights at once, its backward pass and plain PyTorch find the same ones dropped.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed for dropout: one int64 on the device, from PyTorch's generator.

    torch.manual_seed, checkpoints that restore the generator and torch.compile's functional random numbers therefore
    hold for what is drawn from it; a captured CUDA graph draws another one at every replay.
    """
    return torch.randint(0, 1 << 62, (1,), dtype=torch.int64, device=device)


def check_dropout(dropout_p: float, seed: Tensor | None) -> None:
    """ValueError or TypeError for a probability that is none, and for dropout without a seed."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and less than 1")
    if dropout_p and seed is None:
        raise ValueError(f"seed is None where dropout_p is {dropout_p}; draw one by burnish.ops.draw_seed(q.device)")
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (1,)):
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; it must be one int64, of shape (1,)")


def threshold_of(dropout_p: float) -> int:
    """A weight is kept where the upper 31 bits of its random word are at least this."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def kept_weights(seed: Tensor, dropout_p: float, batch: int, heads: int, lq: int, lk: int) -> Tensor:
    """True where dropout keeps the weight of a query for a key: (batch, heads, lq, lk).

    One counter serves four neighbouring keys: (key // 4, query, batch entry * heads + head, 0), word key % 4.
    """
    device = seed.device
    quads = torch.arange((lk + 3) // 4, device=device)
    queries = torch.arange(lq, device=device)[:, None]
    places = torch.arange(batch * heads, device=device)[:, None, None]
    words = torch.stack(torch.broadcast_tensors(*philox(seed, quads, queries, places, torch.zeros_like(seed))), dim=-1)
    return ((words >> 1) >= threshold_of(dropout_p)).flatten(-2)[..., :lk].reshape(batch, heads, lq, lk)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four random words for each counter (c0, c1, c2, c3), under the 64 bits of `seed` as the key.

    int64 all, counters and words in 0 to 2**32 - 1; they broadcast. The same words as `triton.language.philox`.
    """
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        # Products wrap around in int64, whose bits are still those of the unsigned product.
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (odd >> 32 & _WORD) ^ c1 ^ k0, odd & _WORD
        c2, c3 = (even >> 32 & _WORD) ^ c3 ^ k1, even & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3
