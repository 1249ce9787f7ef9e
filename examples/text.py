"""The text that is learned: its tokenizer, and the batches of each step."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SHIPPED = Path(__file__).parent / "data" / "devils_dictionary.txt"
BYTES = 256  # tokens of a byte-level tokenizer that has learned nothing
HELD_OUT = 0.1  # of the text, its end


def read_text(path: Path) -> str:
    """The file's text. ValueError where it is not UTF-8 or has nothing in it, OSError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path}: there is no text in it")
    return text


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocab_size` tokens learned from `text`; the same text gives the same tokens.

    It takes any text: what was not learned is written in bytes. ValueError where `vocab_size` is less than 256, or more
    than the text has pairs for.
    """
    if vocab_size < BYTES:
        raise ValueError(f"--vocab {vocab_size}: a byte-level tokenizer has {BYTES} tokens at least")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"--vocab {vocab_size}: the text gives {found} tokens at most")
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer as `Tokenizer.save` wrote it. ValueError for another file, OSError where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer: {error}") from None


@dataclass(frozen=True)
class Tokens:
    """A text as token ids, int64, on the CPU; the end is held out, to tell what was learned from what was learned by
    heart."""

    training: Tensor
    held_out: Tensor

    @staticmethod
    def of(text: str, tokenizer: Tokenizer) -> Tokens:
        ids = torch.tensor(tokenizer.encode(text).ids)
        split = ids.numel() - int(HELD_OUT * ids.numel())
        return Tokens(ids[:split], ids[split:])

    def check(self, context: int) -> None:
        """ValueError where a window of `context` tokens and the next does not fit into the text held out."""
        if self.held_out.numel() < context + 2:
            raise ValueError(f"--context {context}: of the text only {self.held_out.numel()} tokens are held out")


def draw_batch(tokens: Tensor, rows: int, context: int, *seed: int | str) -> tuple[Tensor, Tensor]:
    """Windows of `tokens` (N,) at places that `seed` alone decides, and the tokens that follow each: two tensors
    (rows, context)."""
    places = random.Random(repr(seed))  # of a text, so that every part of the seed counts
    starts = [places.randrange(tokens.numel() - context) for _ in range(rows)]
    windows = torch.stack([tokens[start : start + context + 1] for start in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
