"""How well a language model predicts a text: the number that says what quantization costs."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.runtime.module import OptimizedModule

_LOGITS_AT_ONCE = 1 << 24  # that are converted to float32 at a time

# Jane Austen, "Pride and Prejudice" (1813), in the public domain.
TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.
"""


def perplexity(model: nn.Module, input_ids: Tensor, *, window: int = 512) -> float:
    """`exp` of the mean negative log likelihood of each token, given those before it in its row.

    Args:
        model: gives logits (batch, length, vocabulary) for `input_ids`, alone, as `.logits` or first in a tuple.
        input_ids: (batch, length) integers, without padding.
        window: longer rows are cut into pieces of so many tokens, of which none sees another.

    Computed in float32, from the logits as they are, without gradients.

    Raises:
        ValueError: input_ids of another shape or without two tokens in a row, or a model without such logits.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, length), length at least 2")
    if window < 2:
        raise ValueError(f"window is {window}; the first of its tokens is not predicted, so it must be 2 or more")
    total, count = 0.0, 0
    with torch.no_grad():
        for piece in input_ids.split(window, dim=1):
            if piece.shape[1] > 1:
                total += _negative_log_likelihood(_logits(model, piece)[:, :-1], piece[:, 1:])
                count += piece[:, 1:].numel()
    return math.exp(total / count)


def perplexity_change(fast: OptimizedModule, input_ids: Tensor, *, window: int = 512) -> tuple[float, float]:
    """The perplexity of the model that `fast` was made from, and of `fast`, which its report shows from now on.

    Arguments and errors as for `perplexity`.
    """
    before = perplexity(fast._original, input_ids, window=window)
    found = before, perplexity(fast, input_ids, window=window)
    fast.serving.perplexity = found  # type: ignore[attr-defined]  # a Resolver is a Serving here
    return found


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """The sum over all tokens."""
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    rows = max(1, _LOGITS_AT_ONCE // flat.shape[1])
    parts = zip(flat.split(rows), wanted.split(rows), strict=True)
    return sum(float(F.cross_entropy(part.float(), of, reduction="sum")) for part, of in parts)


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    original = getattr(model, "_original", model)  # an optimized model's forward takes what that of its original takes
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(original.forward).parameters else {}
    result: Any = model(input_ids, **no_cache)
    result = getattr(result, "logits", result[0] if isinstance(result, (tuple, list)) else result)
    if not isinstance(result, Tensor) or result.shape[:-1] != input_ids.shape:
        shape = f"of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ValueError(f"{type(original).__name__} gives {shape}, no logits (batch, length, vocabulary)")
    return result
