"""`fast.generate(...)`: the prompt once, then a token at a time from a KVCache; on CUDA each step is one graph.

A step takes the last token, appends to the cache, samples the next token and writes it where the one after it will be
read: the host launches steps and waits for none of them. Whether all rows have ended it learns some steps later.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish import ops
from burnish.op import Op
from burnish.prepare import GraphEntry, PlainEntry
from burnish.runtime.cuda_graph import GraphMemory
from burnish.runtime.kv_cache import KVCache
from burnish.runtime.module import STALE, OptimizedModule
from burnish.tuning import Tuner

LENGTH_STEP = 256
"""A cache holds a multiple of so many tokens, so that the next prompt finds one that fits."""

_CHECK_EVERY = 8  # steps on CUDA between looks at whether all rows have ended

# What a GenerationConfig may say and is not built here; each with the value that says nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "renormalize_logits": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "output_attentions": None,
    "output_hidden_states": None,
    "use_cache": True,
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: arguments of the Ops `sample_token` and `penalize_repetition`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0

    @classmethod
    def of(cls, config: Any) -> Sampling:
        """That of a Hugging Face GenerationConfig."""
        eos = config.eos_token_id
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
        penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
        if not config.do_sample:
            return cls(repetition_penalty=penalty, eos=eos, pad=pad)
        given = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(True, **given, repetition_penalty=penalty, eos=eos, pad=pad)


class Session:
    """The memory of one batch that is generated, and the step on it; it serves one prompt after another.

    Attributes:
        cache: the keys and values so far.
        sequences: (batch, max length) int64, prompt and new tokens.
        finished: (batch,) bool, rows that have ended.
    """

    def __init__(self, model: OptimizedModule, batch: int, max_length: int, padded: bool, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.cache = KVCache.of(model, batch, max_length)
        device = self.cache.lengths.device
        self.sequences = torch.zeros(batch, max_length, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self._eos = torch.tensor(sampling.eos, dtype=torch.int64, device=device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        # With left padding only: which positions are real, where rows begin, and the position of the next token.
        self._mask = torch.ones(batch, max_length, dtype=torch.int64, device=device) if padded else None
        self._start = torch.zeros(batch, dtype=torch.int64, device=device) if padded else None
        self._position = torch.zeros(batch, 1, dtype=torch.int64, device=device) if padded else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory: GraphMemory | None = None
        self._logits: Tensor | None = None  # what the graph leaves there
        self._entry: Any = None
        self._functions: dict[str, Callable[..., Any]] = {}

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, seed: int) -> Tensor:
        """Runs the prompt and chooses the first token. Returns the logits that it was chosen from, (batch, vocab)."""
        self.cache.reset()
        self.finished.zero_()
        self.seed.fill_(seed)
        length = input_ids.shape[1]
        self.sequences[:, :length] = input_ids
        call: dict[str, Any] = {"input_ids": input_ids, "past_key_values": self.cache, "use_cache": True}
        if self._mask is not None and self._start is not None and self._position is not None:
            assert attention_mask is not None
            self._mask.fill_(1)
            self._mask[:, :length] = attention_mask
            self._start.copy_(length - attention_mask.sum(dim=1))
            self._position[:, 0] = attention_mask.sum(dim=1)
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            call |= {"attention_mask": attention_mask, "position_ids": positions}
        if "logits_to_keep" in self.model._names:
            call["logits_to_keep"] = 1
        logits: Tensor = self.model(**call).logits[:, -1]
        self._choose(logits)
        return logits

    def step(self) -> Tensor:
        """Runs one token and chooses the next. Returns the logits, which the next step may overwrite."""
        self.cache.check_room(1)
        logits = self._replayed() if self._token.is_cuda else self._run()
        self.cache.filled += 1
        return logits

    def _replayed(self) -> Tensor:
        if self._graph is None or self._moved():
            self._prepare()
        if self._graph is None:  # it cannot be captured
            return self._run()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _moved(self) -> bool:
        return isinstance(self._entry, PlainEntry) and self._entry.places.read() is None

    def _prepare(self) -> None:
        """Captures a step, where it can be."""
        self._graph, self._entry = None, self._entry_of_step()
        if not isinstance(self._entry, PlainEntry):
            return
        self._memory = self._memory or GraphMemory()
        saved = [(t, t.clone()) for t in self._changed()]
        try:
            self._run()  # compiles and loads what a capture must not
            for tensor, before in saved:
                tensor.copy_(before)
            self._graph, self._logits = self._memory.capture(self._run)
        except RuntimeError as error:
            warnings.warn(f"generate: the steps are not captured: {str(error).splitlines()[0]}", stacklevel=2)
            for tensor, before in saved:
                tensor.copy_(before)

    def _changed(self) -> list[Tensor]:
        """What a step changes that a second run would change again."""
        counters = [self.cache.lengths, self._token, self.finished, self.sequences]
        return counters if self._position is None else [*counters, self._position]

    def _call(self) -> dict[str, Any]:
        call = {"input_ids": self._token, "past_key_values": self.cache, "use_cache": True}
        if self._mask is not None:
            call |= {"attention_mask": self._mask, "position_ids": self._position}
        return call

    def _entry_of_step(self) -> Any:
        """What serves a step: chosen and verified as for any call."""
        model = self.model
        call = model._call((), self._call())
        key = None if call is None else model._key(call, differentiable=False)
        if call is None or key is None:
            return None
        if key not in model._entries:
            model._make_entry(key, call, differentiable=False)
        entry = model._entries[key]
        if entry(call) is STALE:
            return None
        return entry.plain if isinstance(entry, GraphEntry) else entry

    def _run(self) -> Tensor:
        if self._entry is None:
            self._entry = self._entry_of_step()
        call = self._call()
        if isinstance(self._entry, PlainEntry):
            flat = self.model._call((), call)
            assert flat is not None
            result = self._entry.unflatten(self._entry.run(flat.leaves))
        else:
            result = self.model._original(**call)
        logits: Tensor = self.cache.put_into(result).logits
        self.cache.lengths.add_(1)
        if self._position is not None:
            self._position.add_(1)
        logits = logits[:, -1]
        self._choose(logits)
        return logits

    def _choose(self, logits: Tensor) -> None:
        """The next token, at the place behind what is filled."""
        how, filled = self.sampling, self.cache.lengths
        if how.repetition_penalty != 1.0:
            penalized = (logits, self.sequences, filled, how.repetition_penalty, self._start)
            logits = self._fastest(ops.penalize_repetition, *penalized)
        drawn = (logits, self.seed, filled, how.temperature, how.top_k, how.top_p, how.min_p, how.do_sample)
        token = self._fastest(ops.sample_token, *drawn)
        if how.eos:
            token = torch.where(self.finished, how.pad, token)
            self.finished |= torch.isin(token, self._eos)
        self._token.copy_(token[:, None])
        self.sequences.index_copy_(1, filled.reshape(1), self._token)

    def _fastest(self, op: Op, *args: Any) -> Any:
        """The Op by the Impl that is fastest here: all its calls are alike."""
        if op.name not in self._functions:
            tuner: Tuner = self.model.schedule.tuner  # type: ignore[attr-defined]  # a Resolver is a Schedule here
            chosen = tuner.choose(op, args, budget_us=Tuner.FIRST_BUDGET_US, thorough=True)
            self._functions[op.name], _ = chosen
        return self._functions[op.name](*args)

    def finish_rows(self, rows: Sequence[int]) -> None:
        """These rows have ended, for a reason that only the host sees."""
        self.finished[list(rows)] = True


@dataclass
class _Ending:
    """When all rows have ended: asked of the device, and answered when it has come so far."""

    session: Session
    stop: Callable[[int], bool] | None
    asked: list[tuple[torch.cuda.Event, Tensor]] = field(default_factory=list)

    def reached(self, new_tokens: int) -> bool:
        session = self.session
        if self.stop is not None and self.stop(new_tokens):
            return True
        if not session.sampling.eos and self.stop is None:
            return False
        if not session.finished.is_cuda:
            return bool(session.finished.all())
        if new_tokens % _CHECK_EVERY:
            return False
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(session.finished.all(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.asked.append((event, answer))
        if len(self.asked) < 2:
            return False
        event, answer = self.asked.pop(0)
        event.synchronize()
        return bool(answer)


def generate(
    model: OptimizedModule,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """What Hugging Face's `generate` returns, a step at a time at the memory's speed.

    Args:
        input_ids: (batch, length) int64, prompts that are padded on the left.
        attention_mask: (batch, length), nonzero for real tokens; None: all are.
        generation_config: a transformers GenerationConfig; None: the model's. `options` are its fields, and go first
            (`max_new_tokens=128, do_sample=True, top_p=0.9`).
        streamer: an object with `put(tokens)` and `end()`, such as transformers' TextStreamer.
        tokenizer: for `stop_strings`.
        seed: of the random numbers; None draws one from torch's generator. The same seed gives the same tokens,
            whatever else is in the batch.

    Returns:
        (batch, length + new tokens) int64, rows that ended early filled up with the pad token; with
        `return_dict_in_generate` a GenerateDecoderOnlyOutput with `sequences` and, where asked for, `scores` and
        `logits`.

    Beam search, assisted decoding and other options that are not built here go to Hugging Face's own `generate`, as do
    encoder-decoders; a warning says so.

    Raises:
        ValueError: a prompt that is not (batch, length), padding on the right, no room for new tokens.
    """
    original = model._original
    config, rest = original._prepare_generation_config(generation_config, **options)
    reasons = [f"{name}={value!r}" for name, value in _unknown(config)] + [f"{name}=..." for name in rest]
    if getattr(original.config, "is_encoder_decoder", False):
        reasons.insert(0, "the model has an encoder")
    if reasons:
        return _fall_back(model, reasons, input_ids, attention_mask, generation_config, streamer, tokenizer, options)
    attention_mask = _checked(input_ids, attention_mask)
    length = input_ids.shape[1]
    new = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - length
    if new < 1:
        raise ValueError(f"max_length={config.max_length}: the prompt has {length} tokens already; give max_new_tokens")
    if config.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    with torch.no_grad(), _session(model, input_ids.shape[0], length + new, attention_mask, config) as session:
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        stop = _stop_strings(session, length, config, tokenizer)
        scores: list[Tensor] | None = [] if config.output_scores or config.output_logits else None
        count = 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for logits in _steps(session, input_ids, attention_mask, seed, new, _Ending(session, stop)):
            count += 1
            if scores is not None:
                scores.append(logits.float().clone())
            if streamer is not None:
                streamer.put(session.sequences[:, length + count - 1].cpu())
        if streamer is not None:
            streamer.end()
        sequences = _trimmed(session.sequences[:, : length + count].clone(), length, session.sampling)
    if not config.return_dict_in_generate:
        return sequences
    return _record(sequences, scores, config)


def _steps(
    session: Session, input_ids: Tensor, attention_mask: Tensor | None, seed: int, new: int, ending: _Ending
) -> Iterator[Tensor]:
    yield session.prefill(input_ids, attention_mask, seed)
    for count in range(1, new):
        if ending.reached(count):
            return
        yield session.step()


def _unknown(config: Any) -> Iterator[tuple[str, Any]]:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral and value is not False:
            yield name, value


def _fall_back(
    model: OptimizedModule,
    reasons: Sequence[str],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: Any,
    streamer: Any,
    tokenizer: Any,
    options: dict[str, Any],
) -> Any:
    warnings.warn(f"generate: left to Hugging Face, because of {', '.join(reasons)}", stacklevel=3)
    given = {"attention_mask": attention_mask, "streamer": streamer, "tokenizer": tokenizer}
    options |= {name: value for name, value in given.items() if value is not None}
    return model._original.generate(input_ids, generation_config=generation_config, **options)


def _checked(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask, None where it says nothing."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, length), not empty")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for input_ids of {tuple(input_ids.shape)} it "
            "must have the same"
        )
    real = attention_mask != 0
    if bool(real.all()):
        return None
    if bool((real[:, 1:] < real[:, :-1]).any()) or not bool(real[:, -1].all()):
        raise ValueError("attention_mask: prompts must be padded on the left (tokenizer.padding_side = 'left')")
    return real.to(torch.int64)


class _session:  # noqa: N801  (a context manager)
    """The model's last session where it fits and nobody uses it, or a new one."""

    def __init__(
        self, model: OptimizedModule, batch: int, length: int, attention_mask: Tensor | None, config: Any
    ) -> None:
        self._model = model
        self._key = (batch, attention_mask is not None, Sampling.of(config))
        self._length = length

    def __enter__(self) -> Session:
        with _lock:
            kept: tuple[Any, Session] | None = self._model.__dict__.pop("_session", None)
        if kept is not None and kept[0] == self._key and kept[1].cache.max_length >= self._length:
            self._session = kept[1]
        else:
            kept = None  # its memory serves the new one
            batch, padded, sampling = self._key
            longest = -(-self._length // LENGTH_STEP) * LENGTH_STEP
            self._session = Session(self._model, batch, longest, padded, sampling)
        return self._session

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            with _lock:
                self._model.__dict__["_session"] = (self._key, self._session)


_lock = threading.Lock()


def _stop_strings(session: Session, length: int, config: Any, tokenizer: Any) -> Callable[[int], bool] | None:
    """Ends the rows in whose new text a stop string is; on CUDA it looks only every few steps."""
    strings = config.stop_strings
    if not strings:
        return None
    strings = [strings] if isinstance(strings, str) else list(strings)

    def look(new_tokens: int) -> bool:
        if session.sequences.is_cuda and new_tokens % _CHECK_EVERY:
            return False
        rows = session.sequences[:, length : length + new_tokens].tolist()
        for row, tokens in enumerate(rows):
            end = _end_of(tokens, strings, tokenizer)
            if end is not None:
                session.sequences[row, length + end : length + new_tokens] = session.sampling.pad
                session.finish_rows([row])
                ended.add(row)
        return len(ended) == len(rows)

    ended: set[int] = set()
    return look


def _end_of(tokens: Sequence[int], strings: Sequence[str], tokenizer: Any) -> int | None:
    """How many of the tokens it takes until one of the strings is there."""
    text = tokenizer.decode(tokens)
    if not any(string in text for string in strings):
        return None
    return next(n for n in range(1, len(tokens) + 1) if any(s in tokenizer.decode(tokens[:n]) for s in strings))


def _trimmed(sequences: Tensor, length: int, sampling: Sampling) -> Tensor:
    """Without columns behind the end of all rows, which steps wrote before the host knew."""
    if not sampling.eos:
        return sequences
    ends = torch.isin(sequences[:, length:], torch.tensor(sampling.eos, device=sequences.device))
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, sequences.shape[1] - length)
    return sequences[:, : length + int(first.max())]


def _record(sequences: Tensor, scores: list[Tensor] | None, config: Any) -> Any:
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    logits = tuple(scores) if scores is not None and config.output_logits else None
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(scores) if scores is not None and config.output_scores else None,
        logits=logits,
    )
