"""`fast.generate(...)`: the prompt once, then a token at a time. The host launches steps without waiting for one;
whether all rows have ended it learns some steps later."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish.runtime.module import OptimizedModule
from burnish.runtime.session import Sampling, Session

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
    batch, padded, sampling = input_ids.shape[0], attention_mask is not None, Sampling.of(config)
    with torch.no_grad(), _session(model, batch, length + new, padded, sampling) as session:
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


_lock = threading.Lock()


@contextmanager
def _session(model: OptimizedModule, batch: int, length: int, padded: bool, sampling: Sampling) -> Iterator[Session]:
    """The model's last session where it fits and nobody uses it, or a new one."""
    key = (batch, padded, sampling)
    with _lock:
        last: tuple[Any, Session] | None = model.__dict__.pop("_session", None)
    if last is not None and last[0] == key and last[1].cache.max_length >= length:
        session = last[1]
    else:
        del last  # its memory serves the new one
        session = Session(model, batch, -(-length // LENGTH_STEP) * LENGTH_STEP, padded, sampling)
    yield session
    with _lock:  # one that failed is not used again
        model.__dict__["_session"] = (key, session)


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
