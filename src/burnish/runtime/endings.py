"""When the rows of a batch that is generated end: at a token, which the device sees, or at a string, which only the
host can see. What steps wrote behind an end before anybody knew is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.runtime.session import Session

CHECK_EVERY = 8  # steps on CUDA between looks


class Endings:
    """Those of one batch.

    Args:
        length: of the prompt.
        strings: a row ends with the token that completes one of them; `tokenizer` decodes the tokens.
        at_once: look after each step, though that waits for the device.
    """

    def __init__(self, session: Session, length: int, strings: Sequence[str], tokenizer: Any, at_once: bool) -> None:
        self._session, self._length = session, length
        self._strings, self._tokenizer = strings, tokenizer
        self._at_once = at_once or not session.sequences.is_cuda
        self._found: dict[int, int] = {}  # by row, how many new tokens it takes until a string is there
        self._asked: list[tuple[torch.cuda.Event, Tensor]] = []

    def reached(self, new_tokens: int) -> bool:
        """Whether all rows have ended, as far as is known by now."""
        if not self._session.sampling.may_end or (not self._at_once and new_tokens % CHECK_EVERY):
            return False
        self._look_for_strings(new_tokens)
        finished = self._session.finished.all()
        if self._at_once:
            return bool(finished)
        return self._answer_before(finished)

    def cut(self, new_tokens: int) -> Tensor:
        """The sequences, each padded behind its end, without columns behind the last end."""
        self._look_for_strings(new_tokens)
        sequences = self._session.sequences[:, : self._length + new_tokens].clone()
        sampling = self._session.sampling
        new = sequences[:, self._length :]
        is_end = torch.isin(new, torch.tensor(sampling.eos, dtype=torch.int64, device=new.device))
        ends = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, new_tokens).tolist()
        for row, end in self._found.items():
            ends[row] = min(ends[row], end)
            new[row, end:] = sampling.pad
        return sequences[:, : self._length + max(ends)]

    def _look_for_strings(self, new_tokens: int) -> None:
        if not self._strings:
            return
        rows = self._session.sequences[:, self._length : self._length + new_tokens].tolist()
        for row, tokens in enumerate(rows):
            if row not in self._found and (end := self._end_of(tokens)) is not None:
                self._found[row] = end
                self._session.finished[row] = True

    def _end_of(self, tokens: Sequence[int]) -> int | None:
        def has_string(count: int) -> bool:
            text = self._tokenizer.decode(tokens[:count])
            return any(string in text for string in self._strings)

        return next(n for n in range(1, len(tokens) + 1) if has_string(n)) if has_string(len(tokens)) else None

    def _answer_before(self, finished: Tensor) -> bool:
        """Asks the device, and gives the answer to the question before, for which it need hardly be waited."""
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(finished, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._asked.append((event, answer))
        if len(self._asked) < 2:
            return False
        event, answer = self._asked.pop(0)
        event.synchronize()
        return bool(answer)
