"""`fast.generate(...)`: the prompt once, then a token at a time. The host launches steps without waiting for one;
whether all rows have ended it learns some steps later."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from burnish.runtime.endings import Endings
from burnish.runtime.module import OptimizedModule
from burnish.runtime.session import Sampling, Session

LENGTH_STEP = 256
"""A cache holds a multiple of so many tokens, so that the next prompt finds one that fits."""

_DEFAULT_NEW_TOKENS = 20  # Hugging Face's

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


def generate(
    model: OptimizedModule,
    inputs: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    *,
    input_ids: Tensor | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """What Hugging Face's `generate` returns, a step at a time at the memory's speed.

    Args:
        inputs: (batch, length) int64, prompts that are padded on the left; also called `input_ids`.
        attention_mask: (batch, length), nonzero for real tokens; None: all are, but for pad tokens.
        generation_config: a transformers GenerationConfig; None: the model's. `options` are its fields, and go first
            (`max_new_tokens=128, do_sample=True, top_p=0.9`).
        streamer: an object with `put(tokens)` and `end()`, such as transformers' TextStreamer; each step is then waited
            for.
        tokenizer: for `stop_strings`.
        seed: of the random numbers; None draws one from torch's generator. The same call with the same seed gives the
            same tokens.

    Returns:
        (batch, length + new tokens) int64, rows that ended early filled up with the pad token; with
        `return_dict_in_generate` a GenerateDecoderOnlyOutput with `sequences` and, where asked for, `scores` and
        `logits`.

    Beam search, assisted decoding and other options that are not built here go to Hugging Face's own `generate`, as do
    encoder-decoders; a warning says so.

    Raises:
        ValueError: a prompt that is not (batch, length), padding on the right, no room for new tokens, numbers out of
            range.
    """
    original: Any = model._original
    input_ids = input_ids if inputs is None else inputs
    if input_ids is None:
        raise ValueError("inputs: the prompts' token ids are needed, (batch, length)")
    config, rest = original._prepare_generation_config(generation_config, **options)
    reasons = [f"{name}={value!r}" for name, value in _unknown(config)] + [f"{name}=..." for name in rest]
    if getattr(original.config, "is_encoder_decoder", False):
        reasons.insert(0, "the model has an encoder")
    if reasons:
        return _fall_back(model, reasons, input_ids, attention_mask, generation_config, streamer, tokenizer, options)
    sampling = Sampling.of(config)
    attention_mask = _checked(input_ids, attention_mask, config.pad_token_id, sampling)
    (batch, length), limit = input_ids.shape, _limit(original.config)
    new = config.max_new_tokens
    if new is None:
        given = (getattr(each, "max_length", None) for each in (generation_config, original.generation_config))
        chosen = "max_length" in options or any(most is not None for most in given)
        new = config.max_length - length if chosen else _DEFAULT_NEW_TOKENS
        if new < 1:
            raise ValueError(
                f"max_length={config.max_length}: the prompt has {length} tokens already; give max_new_tokens"
            )
    if limit is not None and length + new > limit:
        raise ValueError(f"max_new_tokens={new}: with the prompt's {length} that is more than the {limit} positions")
    strings = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
    if strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    room = max(length + new, config.max_cache_len or 0)
    with torch.no_grad(), _session(model, batch, room, attention_mask is not None, sampling) as session:
        endings = Endings(session, length, strings, tokenizer, at_once=streamer is not None)
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        count = 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
        while count < new and not (count and endings.reached(count)):
            found = session.step() if count else session.prefill(input_ids, attention_mask, seed)
            count += 1
            if config.output_logits:
                logits.append(found.float().clone())
            if config.output_scores:
                scores.append(session.scores(found))
            if streamer is not None:
                streamer.put(session.sequences[:, length + count - 1].cpu())
        if streamer is not None:
            streamer.end()
        sequences = endings.cut(count)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    kept = sequences.shape[1] - length
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=tuple(scores[:kept]) or None, logits=tuple(logits[:kept]) or None
    )


def _unknown(config: Any) -> Iterator[tuple[str, Any]]:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral and (value is not False or neutral is True):
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


def _checked(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None, how: Sampling) -> Tensor | None:
    """The mask, None where it says nothing."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"inputs has shape {tuple(input_ids.shape)}; it must be (batch, length), not empty")
    if attention_mask is None:
        if pad is None or pad in how.eos:  # as Hugging Face has it: pad tokens tell, where they can mean nothing else
            return None
        attention_mask = input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for inputs of {tuple(input_ids.shape)} it must "
            "have the same"
        )
    real = attention_mask != 0
    if bool(real.all()):
        return None
    if bool((real[:, 1:] < real[:, :-1]).any()) or not bool(real[:, -1].all()):
        raise ValueError("attention_mask: prompts must be padded on the left (tokenizer.padding_side = 'left')")
    return real.to(torch.int64)


def _limit(config: Any) -> int | None:
    """How many positions there are, where each has an embedding of its own."""
    text = config.get_text_config(decoder=True)
    rotary = any(hasattr(text, name) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    return None if rotary else getattr(text, "max_position_embeddings", None)


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
