"""What `burnish generate` runs: tokens as they come, when they came, and what is said of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from burnish._text import human_bytes, human_us
from burnish.cli.options import CacheMode
from burnish.cli.quantizing import why_slow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from burnish.hardware import DeviceInfo
    from burnish.models import Loaded
    from burnish.quantize import Kind


@dataclass(frozen=True)
class Asked:
    """What is to be generated.

    input_ids: the prompts, or an encoder-decoder's sources. prompts: as texts; None for made-up tokens, without a
    tokenizer. options: of `generate`. eos, stop: what ends a row.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    prompts: tuple[str, ...] | None
    tokenizer: Any
    options: dict[str, Any]
    seed: int
    samples: bool
    eos: tuple[int, ...]
    stop: tuple[str, ...]
    has_encoder: bool = False

    @property
    def first_new(self) -> int:
        """Where new tokens begin in what `generate` returns: behind the prompt, or behind a decoder's start token."""
        return 1 if self.has_encoder else self.input_ids.shape[1]

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these new tokens ends the row."""
        if tokens[-1] in self.eos:
            return True
        return bool(self.stop) and any(string in self.text(tokens) for string in self.stop)

    def until_end(self, tokens: list[int]) -> list[int]:
        return next((tokens[:count] for count in range(1, len(tokens)) if self.ends(tokens[:count])), tokens)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass
class Made:
    """What came, and when.

    rows: new tokens of each row, up to its end. first_us: until the first token was there; step_us: from one token to
    the next, None where there was one only. notes: what the user should know.
    """

    asked: Asked
    rows: list[list[int]]
    first_us: float
    step_us: float | None
    notes: list[str]

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_us is None else len(self.rows) * 1e6 / self.step_us

    def data(self, here: DeviceInfo, weights: int | None) -> dict[str, Any]:
        asked = self.asked
        floor = self._floor_us(here, weights)
        prompts = asked.prompts or [None] * len(self.rows)
        return {
            "device": here.label,
            "rows": [
                {"prompt": prompt, "tokens": row, "text": None if prompt is None else asked.text(row)}
                for prompt, row in zip(prompts, self.rows, strict=True)
            ],
            "prompt_tokens": asked.input_ids.shape[1],
            "seed": asked.seed if asked.samples else None,
            "first_token_us": self.first_us,
            "step_us": self.step_us,
            "tokens_per_second": self.tokens_per_second,
            "weights_bytes": weights,
            "floor_us": floor,
            "share_of_floor": floor / self.step_us if floor is not None and self.step_us is not None else None,
            "notes": self.notes,
        }

    def lines(self, here: DeviceInfo, weights: int | None) -> list[str]:
        count, of_rows = sum(map(len, self.rows)), f" in {len(self.rows)} rows" if len(self.rows) > 1 else ""
        said = f"{count} token{'s' if count != 1 else ''}{of_rows}; the first after {human_us(self.first_us)}"
        if self.step_us is not None:
            said += f", then {self.tokens_per_second:,.4g} tokens per second: {human_us(self.step_us)} a step"
        found = [said]
        floor = self._floor_us(here, weights)
        if floor is not None and self.step_us is not None and weights is not None and here.rates is not None:
            reading = f"{human_bytes(weights)} of weights at {here.rates.copy_gbs:,.0f} GB/s"
            found.append(f"to read {reading} takes {human_us(floor)}, {floor / self.step_us:.0%} of a step's time")
        return found + ([f"seed {self.asked.seed}"] if self.asked.samples else []) + self.notes

    def _floor_us(self, here: DeviceInfo, weights: int | None) -> float | None:
        return None if weights is None or here.rates is None else here.floor_us(0, weights)


@dataclass
class Generator:
    """An optimized model that has generated a few tokens already: nothing is left to compile or to capture."""

    fast: Any
    asked: Asked
    left_to_hugging_face: bool = False  # it has nothing to prepare, and some of it does not stream
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: Loaded, asked: Asked, cache: CacheMode, quantize: Kind | None) -> Generator:
        import burnish

        made = cls(burnish.optimize(loaded.model, cache=cache.mode, quantize=quantize), asked)
        room = asked.first_new + asked.options["max_new_tokens"]
        made._generate(max_new_tokens=min(asked.options["max_new_tokens"], 3), max_cache_len=room)
        made.left_to_hugging_face = bool(made.notes)
        served = made.fast.schedule.served
        for reason in dict.fromkeys(one.kept_original for one in served if one.kept_original is not None):
            count = sum(one.kept_original == reason for one in served)
            made.notes.append(f"in {count} of {len(served)} graphs the model runs as it was: {reason}")
        if said := made.fast.report().quantized():
            made.notes.append(said)
        if quantize is not None and (said := why_slow(quantize, loaded)):
            made.notes.append(said)
        return made

    @property
    def bytes_saved(self) -> int:
        """How much less a step reads of quantized weights."""
        done = self.fast.schedule.quantizations
        return done[-1].bytes_before - done[-1].bytes_after if done else 0

    @property
    def weights_of_a_step(self) -> frozenset[str]:
        """The weights that a step reads, by name; empty where no graph is of a step: the first is of the prompt."""
        steps = self.fast.schedule.programs[1:]
        nodes = steps[-1].captured.graph.nodes if steps else ()
        return frozenset(node.target for node in nodes if node.op == "get_attr")

    def run(self, streams: bool) -> Made:
        asked = self.asked
        if streams:
            stream = Stream(asked)
            self._generate(streamer=stream)
            return Made(asked, [stream.tokens], *stream.times_us(), self.notes)
        began = time.perf_counter()
        self._generate(max_new_tokens=1)
        first = time.perf_counter()
        sequences = self._generate()
        ended = time.perf_counter()
        steps = sequences.shape[1] - asked.first_new - 1
        rows = [asked.until_end(row) for row in sequences[:, asked.first_new :].tolist()]
        seconds = (ended - first) - (first - began)
        step_us = seconds / steps * 1e6 if steps and seconds > 0 else None
        return Made(asked, rows, (first - began) * 1e6, step_us, self.notes)

    def _generate(self, **changes: Any) -> Tensor:
        import torch

        asked = self.asked
        options: dict[str, Any] = {"tokenizer": asked.tokenizer, **asked.options}
        if asked.stop:
            options["stop_strings"] = list(asked.stop)
        with self._noting(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked.seed)  # for Hugging Face's own generate, which takes no seed
            made: Tensor = self.fast.generate(
                asked.input_ids, asked.attention_mask, seed=asked.seed, **(options | changes)
            ).cpu()
        return made

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keeps what generate warns of for the end, each once; transformers' own advice is left out."""
        from burnish.models import quiet_transformers

        with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        said = (str(warning.message) for warning in caught)
        self.notes += [text for text in dict.fromkeys(said) if text.startswith("generate: ") and text not in self.notes]


class Stream:
    """Prints the tokens of one row as they come, up to its end, and keeps when they came."""

    def __init__(self, asked: Asked) -> None:
        self.tokens: list[int] = []
        self._asked, self._times, self._ended = asked, list[float](), False
        self._printer: Any = _Ids()
        if asked.tokenizer is not None:
            from transformers import TextStreamer

            self._printer = TextStreamer(asked.tokenizer, skip_special_tokens=True)

    def put(self, tokens: Tensor) -> None:
        self._times.append(time.perf_counter())
        if len(self._times) == 1 or self._ended:  # the prompt, or what was on its way when the row ended
            return
        self.tokens += tokens.flatten().tolist()
        self._printer.put(tokens)
        self._ended = self._asked.ends(self.tokens)

    def end(self) -> None:
        self._printer.end()

    def times_us(self) -> tuple[float, float | None]:
        """Until the first token, and from one token to the next."""
        prompt, first, *more = self._times
        return (first - prompt) * 1e6, (more[-1] - first) / len(more) * 1e6 if more else None


class _Ids:
    def put(self, tokens: Tensor) -> None:
        print(*tokens.tolist(), end=" ", flush=True)

    def end(self) -> None:
        print()


def print_rows(made: Made) -> None:
    asked = made.asked
    for number, row in enumerate(made.rows):
        if len(made.rows) > 1:
            print("\n" if number else "", f"--- {asked.prompts[number] if asked.prompts else number + 1}", sep="")
        print(" ".join(map(str, row)) if asked.prompts is None else asked.text(row))
