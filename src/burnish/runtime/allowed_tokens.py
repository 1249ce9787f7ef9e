"""Which tokens may come next, as bounds on the device: a captured step applies them, the host changes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRules:
    """Tokens that may not come, or must: the fields of the same names of a Hugging Face GenerationConfig.

    Attributes:
        suppress: never.
        begin_suppress: not as the first new token.
        forced_bos: the token behind a single one, or None.
        forced_eos: the last token that there is room for is one of these.
    """

    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()

    def at(self, length: int, prompt: int, last: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What must come and what may not behind `length` tokens, of which `prompt` were given; as Hugging Face's
        logits processors have it."""
        begin = prompt + 1 if prompt == 1 and self.forced_bos is not None else prompt
        suppressed = self.suppress + (self.begin_suppress if length == begin else ())
        if last and self.forced_eos:
            return self.forced_eos, suppressed
        return ((self.forced_bos,) if length == 1 and self.forced_bos is not None else ()), suppressed


class AllowedTokens:
    """The rules at one place, as bounds on logits like those given; always in the same memory."""

    def __init__(self, rules: TokenRules, logits: Tensor) -> None:
        self.rules = rules
        self._low = torch.full_like(logits[0], -torch.inf)
        self._high = torch.full_like(logits[0], torch.inf)
        self._now: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def move_to(self, length: int, prompt: int, last: bool) -> None:
        """To the token behind `length` tokens, of which `prompt` were given."""
        wanted = self.rules.at(length, prompt, last)
        if wanted == self._now:
            return
        self._now, (forced, suppressed) = wanted, wanted
        self._low.fill_(-torch.inf)
        self._high.fill_(-torch.inf if forced else torch.inf)
        for bound in (self._low, self._high):
            self._set(bound, forced, 0.0)
        self._set(self._high, suppressed, -torch.inf)

    def apply(self, logits: Tensor) -> Tensor:
        """(batch, vocabulary): -inf where a token may not come; forced tokens at 0, as Hugging Face has it."""
        return logits.clamp(self._low.to(logits.dtype), self._high.to(logits.dtype))

    def _set(self, bound: Tensor, tokens: tuple[int, ...], value: float) -> None:
        known = [token for token in tokens if 0 <= token < len(bound)]
        bound[torch.tensor(known, dtype=torch.int64, device=bound.device)] = value
