"""What a training run is asked to do, with every value checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch

from burnish.cli.words import as_typed
from burnish.hardware import device
from examples.gpt import PRESETS, GPTConfig
from examples.text import BYTES

HOW = ("eager", "compile", "burnish", "optimize")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
BATCHES = {"tiny": 8, "small": 32, "gpt2-124m": 12}  # rows in a batch, unless asked for otherwise


@dataclass(frozen=True)
class Options:
    """Of one run. `vocab` counts the tokenizer's tokens, `lr` is the highest learning rate, `dtype` what autocast
    computes products in, `how` one of HOW: what runs the model."""

    preset: str
    how: str
    steps: int
    batch: int
    context: int
    vocab: int
    lr: float
    dtype: str
    dropout: float
    device: str
    seed: int
    save_every: int
    evaluate_every: int

    def __post_init__(self) -> None:
        """ValueError, in one line that names the option, for what cannot be."""
        for each in fields(self):
            value, kinds = getattr(self, each.name), _KINDS[str(each.type)]
            if not isinstance(value, kinds) or isinstance(value, bool):
                self._refuse(each.name, f"a {each.type} is wanted")
        for name, known in (("preset", PRESETS), ("how", HOW), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                self._refuse(name, f"there are {', '.join(known)}")
        for name in ("steps", "batch", "context", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            self._refuse("lr", "a number greater than 0")
        if not 0 <= self.dropout < 1:
            self._refuse("dropout", "from 0 to below 1")
        if not 0 <= self.seed < 2**32:
            self._refuse("seed", "from 0 to 2**32 - 1")
        most = PRESETS[self.preset].vocab_size
        if not BYTES <= self.vocab <= most:
            self._refuse("vocab", f"from {BYTES}, the bytes, to the model's {most}")
        with as_typed(target="--device"):
            device(self.device, measure=False)

    def _refuse(self, name: str, because: str) -> NoReturn:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {because}")

    @property
    def config(self) -> GPTConfig:
        return replace(PRESETS[self.preset], context=self.context, dropout=self.dropout)

    @property
    def case(self) -> str:
        """The run in a word, without how it runs."""
        return f"nanogpt-{self.preset}-{self.dtype}-b{self.batch}-s{self.context}"

    def by(self, how: str) -> Options:
        """The same, run in another way."""
        return replace(self, how=how)

    @staticmethod
    def parse(values: Any) -> Options:
        """Options as `dataclasses.asdict` gave them. ValueError for anything else."""
        names = {each.name for each in fields(Options)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError("its options are not those of a run")
        return Options(**values)
