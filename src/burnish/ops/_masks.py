"""Which query may attend to which key, as one boolean or additive mask of the smallest shape that broadcasts."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_pairs(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, is_causal: bool, window: int | None
) -> Tensor | None:
    """True where the query may attend to the key: (Lq, Lk), (B, 1, 1, Lk) or (B, 1, Lq, Lk); None where all may.

    The last query sits at the last key's position (bottom-right aligned).
    """
    allowed = None if key_padding_mask is None else key_padding_mask.to(torch.bool)[:, None, None, :]
    if not is_causal and window is None:
        return allowed
    positions = torch.arange(k.shape[2], device=q.device)
    # How many positions before the query the key lies; negative for keys to come.
    distance = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2]) - positions
    if is_causal:
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    else:
        assert window is not None
        near = distance.abs() < window
    return near if allowed is None else allowed & near


def additive_mask(bias: Tensor | None, allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias (additive or boolean) and `allowed` as one float mask, -inf where not allowed, with four dimensions."""
    if bias is not None and bias.dtype == torch.bool:
        allowed, bias = bias if allowed is None else bias & allowed, None
    if bias is not None:
        bias = bias.to(dtype)
        mask = bias if allowed is None else torch.where(allowed, bias, -torch.inf)
    elif allowed is not None:
        mask = torch.zeros_like(allowed, dtype=dtype).masked_fill_(allowed.logical_not(), -torch.inf)
    else:
        return None
    return mask[(None,) * (4 - mask.dim())]


def attended_pairs(lq: int, lk: int, is_causal: bool, window: int | None) -> int:
    """How many (query, key) pairs causality and window leave, of one head; exact for lq <= lk."""
    pairs = _staircase(lq, lk) if is_causal else lq * lk
    if window is not None:
        pairs -= _staircase(lq, lk - window)
        if not is_causal:
            pairs -= _staircase(lq, lq - window)
    return pairs


def _staircase(rows: int, longest: int) -> int:
    """longest + (longest - 1) + ..., for at most `rows` rows."""
    rows = max(0, min(rows, longest))
    return rows * longest - rows * (rows - 1) // 2
