"""`burnish generate`: text, or token ids, as it comes, and what a token took."""

from __future__ import annotations

import secrets
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish._text import human_bytes, human_us
from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    CacheMode,
    CacheOption,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelArgument,
    load_model,
    resolve_device,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from burnish.hardware import DeviceInfo
    from burnish.models import Loaded

_PROMPT, _CHOICE = "The prompt", "How a token is chosen"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call them


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to go on from; repeat it for more rows.", rich_help_panel=_PROMPT),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Without --prompt: rows of made-up tokens (1).", rich_help_panel=_PROMPT)
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=1, help="Without --prompt: tokens in a row (128).", rich_help_panel=_PROMPT)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each row, at the most.")] = 64,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a row where this string is in its new text; repeatable.")
    ] = None,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            help="Draw the tokens, or take the likeliest; default: what the model's generation config says.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, rich_help_panel=_CHOICE)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 keeps all.", rich_help_panel=_CHOICE)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_CHOICE)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_CHOICE)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, rich_help_panel=_CHOICE)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same one draws the same tokens.", rich_help_panel=_CHOICE)
    ] = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    cache: CacheOption = CacheMode.readwrite,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print all at the end: the host waits for no token.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate text (without --prompt: token ids after made-up ones) and show what a token took."""
    output = Output(as_json)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = _options(model, prompt, batch, seq, stop, sample, drawn)
    options |= {"max_new_tokens": max_new_tokens}
    options |= {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    with output.working("starting PyTorch") as update:
        target = resolve_device(device)
        update(f"measuring {target}")
        from burnish.hardware import device as describe

        here = describe(target)
        update(f"loading {model}")
        loaded = load_model(model, batch, seq if prompt is None else 1, None, dtype, layers, device)
        _check_generates(loaded)
        tokenizer = _tokenizer(model) if prompt is not None else None
        asked = _asked(loaded, prompt, tokenizer, options, stop, secrets.randbelow(2**31) if seed is None else seed)
        weights = _weights_of_a_step(loaded.model)
        update(f"optimizing {model}: capture, rewrite, measure, verify")
        generator = _Generator.of(loaded, asked, cache)
    streams = not (no_stream or as_json or generator.left_to_hugging_face) and asked.input_ids.shape[0] == 1
    made = generator.run(streams)
    output.data({"name": model, "origin": loaded.origin, **made.data(here, weights)})
    if not streams and not as_json:
        _print_rows(made)
    if not as_json:
        print("", *made.lines(here, weights), sep="\n", file=sys.stderr)


def _options(
    model: str,
    prompt: Sequence[str] | None,
    batch: int | None,
    seq: int | None,
    stop: Sequence[str] | None,
    sample: bool | None,
    drawn: dict[str, Any],
) -> dict[str, Any]:
    """What is handed on to `generate` of how a token is chosen; an error where options contradict each other."""
    given = {name: value for name, value in drawn.items() if value is not None}
    if sample is False and given:
        name = next(iter(given)).replace("_", "-")
        raise typer.BadParameter(f"--{name} is for tokens that are drawn; leave it or --greedy out")
    if prompt is None and stop:
        raise typer.BadParameter("--stop: made-up tokens have no text to find it in; give a --prompt")
    if prompt is not None:
        for option, value, why in (("--batch", batch, "each prompt is a row"), ("--seq", seq, "a prompt has a length")):
            if value is not None:
                raise typer.BadParameter(f"{option} is of made-up tokens, and {why}; leave it out")
        if any(not text for text in (*prompt, *(stop or ()))):
            raise typer.BadParameter("--prompt and --stop: an empty text will not do")
        from burnish.models import PRESETS

        if model in PRESETS:
            raise typer.BadParameter(f"--prompt: {model} has random weights and no tokenizer; use a folder or a hub id")
        if ":" in model and not Path(model).is_dir():
            raise typer.BadParameter(f"--prompt: there is no tokenizer for {model}; leave it out for made-up tokens")
    return given | ({} if sample is None and not given else {"do_sample": sample is not False})


def _check_generates(loaded: Loaded) -> None:
    """ModelError for a model that has no next token to give."""
    from burnish.models import ModelError

    model: Any = loaded.model
    kind = type(model).__name__
    if not hasattr(model, "can_generate"):
        raise ModelError(f"{loaded.name}: {kind} is no Hugging Face model; only those generate here")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{loaded.name}: {kind} has an encoder; only decoders generate here")
    if not model.can_generate() or model.main_input_name != "input_ids":
        raise ModelError(f"{loaded.name}: {kind} does not generate text")


def _tokenizer(model: str) -> Any:
    from burnish.models import ModelError, quiet_transformers

    with quiet_transformers() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"--prompt: {model} has no tokenizer that can be loaded; without --prompt tokens are made up"
            ) from error


def _weights_of_a_step(model: Any) -> int | None:
    """Bytes of the weights that a step reads; None where they depend on the token. Tables of embeddings are only looked
    up in, unless one of them is the last product's weight as well."""
    from torch import nn

    if any(getattr(model.config, name, None) for name in _EXPERTS):
        return None
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(getattr(head, "weight", None))}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


# --- the prompt -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What is to be generated.

    prompts: as texts; None for made-up tokens, without a tokenizer. options: of `generate`. eos, stop: what ends a row.
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

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these new tokens ends the row."""
        if tokens[-1] in self.eos:
            return True
        return bool(self.stop) and any(string in self.text(tokens) for string in self.stop)

    def until_end(self, tokens: list[int]) -> list[int]:
        return next((tokens[:count] for count in range(1, len(tokens)) if self.ends(tokens[:count])), tokens)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _asked(
    loaded: Loaded,
    prompts: Sequence[str] | None,
    tokenizer: Any,
    options: dict[str, Any],
    stop: Sequence[str] | None,
    seed: int,
) -> _Asked:
    from burnish.models import ModelError

    model: Any = loaded.model
    config = model.generation_config
    eos = () if config.eos_token_id is None else config.eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    if prompts is None:
        ids, mask = _made_up(loaded)
    else:
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
        ids, mask = _tokenized(loaded, prompts, tokenizer, pad)
    longest = getattr(model.config, "max_position_embeddings", None)
    length, new = ids.shape[1], options["max_new_tokens"]
    if isinstance(longest, int) and length + new > longest:
        fits = f"give {longest - length} or less" if length < longest else "give a shorter one"
        room = f"{loaded.name} has positions for {longest} tokens, {length} of them for the prompt"
        raise ModelError(f"--max-new-tokens={new}: {room}; {fits}")
    samples = bool(options.get("do_sample", config.do_sample))
    prompts = None if prompts is None else tuple(prompts)
    return _Asked(ids, mask, prompts, tokenizer, options, seed, samples, eos, tuple(stop or ()))


def _made_up(loaded: Loaded) -> tuple[Tensor, Tensor | None]:
    from torch import Tensor

    from burnish.models import ModelError

    ids = loaded.kwargs.get("input_ids", loaded.args[0] if loaded.args else None)
    if not (isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()):
        raise ModelError(f"{loaded.name}: its inputs have no input_ids of (batch, length)")
    return ids, loaded.kwargs.get("attention_mask")


def _tokenized(loaded: Loaded, prompts: Sequence[str], tokenizer: Any, pad: int) -> tuple[Tensor, Tensor | None]:
    """The prompts, padded on the left."""
    import torch

    from burnish.models import ModelError

    rows = [tokenizer(text)["input_ids"] for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise ModelError(f"--prompt: {loaded.name} has no tokens for {text!r}")
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    target = next(loaded.model.parameters()).device
    return ids.to(target), None if bool(mask.all()) else mask.to(target)


# --- the tokens -------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """What came, and when.

    rows: new tokens of each row, up to its end. first_us: until the first token was there; step_us: from one token to
    the next, None where there was one only. notes: what the user should know.
    """

    asked: _Asked
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
class _Generator:
    """An optimized model that has generated a few tokens already: nothing is left to compile or to capture."""

    fast: Any
    asked: _Asked
    left_to_hugging_face: bool = False  # it has nothing to prepare, and some of it does not stream
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: Loaded, asked: _Asked, cache: CacheMode) -> _Generator:
        import burnish

        made = cls(burnish.optimize(loaded.model, cache=cache.mode), asked)
        new = asked.options["max_new_tokens"]
        made._generate(max_new_tokens=1)
        made.left_to_hugging_face = bool(made.notes)
        if new > 1 and not made.left_to_hugging_face:
            made._generate(stop_strings=[_Soon.TEXT], tokenizer=_Soon())
        served = made.fast.schedule.served
        for reason in dict.fromkeys(one.kept_original for one in served if one.kept_original is not None):
            count = sum(one.kept_original == reason for one in served)
            made.notes.append(f"{count} of {len(served)} graphs not used, the model runs as it was: {reason}")
        return made

    def run(self, streams: bool) -> _Made:
        asked = self.asked
        if streams:
            stream = _Stream(asked)
            self._generate(streamer=stream)
            return _Made(asked, [stream.tokens], *stream.times_us(), self.notes)
        began = time.perf_counter()
        self._generate(max_new_tokens=1)
        first = time.perf_counter()
        sequences = self._generate()
        ended = time.perf_counter()
        steps = sequences.shape[1] - asked.input_ids.shape[1] - 1
        rows = [asked.until_end(row) for row in sequences[:, asked.input_ids.shape[1] :].tolist()]
        seconds = (ended - first) - (first - began)
        step_us = seconds / steps * 1e6 if steps and seconds > 0 else None
        return _Made(asked, rows, (first - began) * 1e6, step_us, self.notes)

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


class _Soon:
    """A tokenizer by which every text holds the stop string as soon as there have been two steps."""

    TEXT = "stop"

    def decode(self, tokens: Sequence[int]) -> str:
        return self.TEXT if len(tokens) > 2 else ""


class _Stream:
    """Prints the tokens of one row as they come, up to its end, and keeps when they came."""

    def __init__(self, asked: _Asked) -> None:
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


def _print_rows(made: _Made) -> None:
    asked = made.asked
    for number, row in enumerate(made.rows):
        if len(made.rows) > 1:
            print("\n" if number else "", f"--- {asked.prompts[number] if asked.prompts else number + 1}", sep="")
        print(" ".join(map(str, row)) if asked.prompts is None else asked.text(row))
