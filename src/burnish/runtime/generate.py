"""`fast.generate(...)`: the prompt once, then a token at a time. The host launches steps without waiting for one;
whether all rows have ended it learns some steps later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.runtime import encoder_decoder, whisper
from burnish.runtime.encoder_decoder import EncoderDecoderSession
from burnish.runtime.encoder_decoder_cache import EncoderDecoderKVCache
from burnish.runtime.endings import Endings
from burnish.runtime.fallback import hugging_face, not_built
from burnish.runtime.kv_cache import LENGTH_STEP
from burnish.runtime.module import OptimizedModule
from burnish.runtime.session import Sampling, Session

_DEFAULT_NEW_TOKENS = 20  # Hugging Face's


@dataclass(frozen=True)
class _Prompt:
    """What tokens are generated behind.

    Attributes:
        tokens: (batch, length) int64, what the sequences begin with.
        key: what a session must be made for to serve it.
        session: makes one that has room for so many tokens.
        prefill: gives it the prompt, with a seed, and whether the first token is the last.
    """

    tokens: Tensor
    key: tuple[Any, ...]
    session: Callable[[int], Session]
    prefill: Callable[[Any, int, bool], Tensor]


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
        inputs: (batch, length) int64, prompts that are padded on the left; also called `input_ids`. Of an
            encoder-decoder the source, padded on any side; of Whisper `input_features`, (batch, mel bins, frames).
        attention_mask: (batch, length), nonzero for real tokens; None: all are, but for a decoder's pad tokens.
        generation_config: a transformers GenerationConfig; None: the model's. `options` are its fields, and go first
            (`max_new_tokens=128, do_sample=True, top_p=0.9`). An encoder-decoder takes `decoder_input_ids`, too, and
            Whisper `language` and `task`.
        streamer: an object with `put(tokens)` and `end()`, such as transformers' TextStreamer; each step is then waited
            for.
        tokenizer: for `stop_strings`.
        seed: of the random numbers; None draws one from torch's generator. The same call with the same seed gives the
            same tokens.

    Returns:
        (batch, length + new tokens) int64, rows that ended early filled up with the pad token; an encoder-decoder's
        begin with the decoder's start token, and Whisper's have new tokens alone, without the end. With
        `return_dict_in_generate` a GenerateDecoderOnlyOutput or GenerateEncoderDecoderOutput with `sequences` and,
        where asked for, `scores` and `logits`.

    Beam search and other options that are not built here go to Hugging Face's own `generate`, with the optimized
    forward, and those that it cannot serve (assisted decoding, attention weights) with the model as it was; a warning
    says so, once for each reason. So do Whisper's timestamps and long audio, and encoder-decoders without a static
    cache.

    Raises:
        ValueError: a prompt that is not (batch, length), padding on the right before a decoder, no room for new tokens,
            numbers out of range.
    """
    original: Any = model._original
    has_encoder, is_whisper = (
        getattr(original.config, "is_encoder_decoder", False),
        original.config.model_type == "whisper",
    )
    name = original.main_input_name if has_encoder else "input_ids"
    if name != "input_ids" and input_ids is not None:
        options["input_ids"] = input_ids
    source = inputs if inputs is not None else input_ids if name == "input_ids" else options.pop(name, None)
    given = {name: source, "attention_mask": attention_mask, "generation_config": generation_config, **options}
    given |= {"streamer": streamer, "tokenizer": tokenizer}
    left = {key: value for key, value in given.items() if value is not None or key in options}
    asked = whisper.taken_from(options) if is_whisper else {}
    decoder_tokens = options.pop("decoder_input_ids", None) if has_encoder else None
    config, rest = original._prepare_generation_config(generation_config, **options)
    reasons = [f"{field}={value!r}" for field, value in not_built(config)] + [f"{field}=..." for field in rest]
    if has_encoder:
        reasons = encoder_decoder.why_not(original) + reasons
    if is_whisper:
        reasons += whisper.why_not(original, source, config, asked)
    if reasons:
        return hugging_face(model, reasons, config, left)
    if source is None:
        what = "the prompts' token ids are needed, (batch, length)" if name == "input_ids" else "it is needed"
        raise ValueError(f"{'inputs' if name == 'input_ids' else name}: {what}")

    if is_whisper:
        source, decoder_tokens = whisper.prepared(original, source, config, asked, decoder_tokens)
    sampling = Sampling.of(config)
    if has_encoder:
        prompt = _behind_a_source(model, source, attention_mask, decoder_tokens, config, sampling)
    else:
        prompt = _of_a_decoder(model, source, attention_mask, config, sampling)
    length = prompt.tokens.shape[1]
    chosen = is_whisper or _says_max_length(options, generation_config, original.generation_config)
    new = _new_tokens(config, length, chosen, _limit(original.config))
    sequences, scores, logits = _generated(model, prompt, sampling, config, new, streamer, tokenizer, seed)
    if not config.return_dict_in_generate:
        if not is_whisper:
            return sequences
        result = whisper.transcribed(sequences, length, sampling.pad, sampling.eos, config)
        left.pop("streamer", None)  # it has heard all
        return result if result is not None else hugging_face(model, ["timestamps among the tokens"], config, left)
    return _as_output(sequences, scores, logits, length, has_encoder)


def _generated(
    model: OptimizedModule,
    prompt: _Prompt,
    sampling: Sampling,
    config: Any,
    new: int,
    streamer: Any,
    tokenizer: Any,
    seed: int | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The sequences, and of each new token the scores and logits that are asked for."""
    length = prompt.tokens.shape[1]
    strings = [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
    if strings and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
    if seed is None:  # one for all ranks of a divided model
        seed = model.serving.agreement.first(int(torch.randint(2**62, ())))  # type: ignore[attr-defined]
    room = max(length + new, config.max_cache_len or 0)
    with torch.no_grad(), _session(model, prompt, room, sampling) as session:
        endings = Endings(session, length, strings, tokenizer, at_once=streamer is not None)
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        count = 0
        if streamer is not None:
            streamer.put(prompt.tokens.cpu())
        while count < new and not (count and endings.reached(count)):
            last = count == new - 1
            found = session.step(last) if count else prompt.prefill(session, seed, last)
            count += 1
            if config.output_logits:
                logits.append(found.float().clone())
            if config.output_scores:
                scores.append(session.scores(found))
            if streamer is not None:
                streamer.put(session.sequences[:, length + count - 1].cpu())
        if streamer is not None:
            streamer.end()
        return endings.cut(count), scores, logits


def _as_output(sequences: Tensor, scores: list[Tensor], logits: list[Tensor], prompt: int, has_encoder: bool) -> Any:
    from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

    kept = sequences.shape[1] - prompt
    output = GenerateEncoderDecoderOutput if has_encoder else GenerateDecoderOnlyOutput
    return output(sequences=sequences, scores=tuple(scores[:kept]) or None, logits=tuple(logits[:kept]) or None)


def _says_max_length(options: dict[str, Any], *configs: Any) -> bool:
    """Whether somebody chose it: a prepared config has a default."""
    return "max_length" in options or any(getattr(config, "max_length", None) is not None for config in configs)


def _new_tokens(config: Any, length: int, is_max_length_chosen: bool, limit: int | None) -> int:
    """How many there may be behind so many. ValueError where there is no room."""
    new: int = config.max_new_tokens
    if new is None:
        new = config.max_length - length if is_max_length_chosen else _DEFAULT_NEW_TOKENS
        if new < 1:
            raise ValueError(
                f"max_length={config.max_length}: the prompt has {length} tokens already; give max_new_tokens"
            )
    if limit is not None and length + new > limit:
        raise ValueError(f"max_new_tokens={new}: with the prompt's {length} that is more than the {limit} positions")
    return new


def _of_a_decoder(
    model: OptimizedModule, input_ids: Tensor, attention_mask: Tensor | None, config: Any, sampling: Sampling
) -> _Prompt:
    mask = _checked(input_ids, attention_mask, config.pad_token_id, sampling)
    batch, padded = input_ids.shape[0], mask is not None
    return _Prompt(
        input_ids,
        (batch, padded),
        lambda room: Session(model, batch, room, padded, sampling),
        lambda session, seed, last: session.prefill(input_ids, mask, seed, last),
    )


def _behind_a_source(
    model: OptimizedModule,
    source: Tensor,
    mask: Tensor | None,
    decoder_tokens: Tensor | None,
    config: Any,
    sampling: Sampling,
) -> _Prompt:
    original: Any = model._original
    if source.dtype.is_floating_point:  # audio, of which all counts
        mask, length, source = None, original.config.max_source_positions, source.to(original.dtype)
    else:
        source, mask = encoder_decoder.padded_source(source, mask, sampling.pad, _limit(original.config))
        length = source.shape[1]
    batch = source.shape[0]
    tokens = encoder_decoder.first_tokens(original, batch, decoder_tokens, config, source.device)

    def session(room: int) -> Session:
        cache = EncoderDecoderKVCache.of(model, batch, room, length)
        own_mask = None if mask is None else torch.ones_like(mask)
        return EncoderDecoderSession(model, cache, sampling, original.main_input_name, own_mask)

    return _Prompt(
        tokens,
        (batch, length, mask is not None),
        session,
        lambda session, seed, last: session.prefill_from(source, mask, tokens, seed, last),
    )


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
    return None if rotary else getattr(text, "max_target_positions", getattr(text, "max_position_embeddings", None))


_lock = threading.Lock()


@contextmanager
def _session(model: OptimizedModule, prompt: _Prompt, length: int, sampling: Sampling) -> Iterator[Session]:
    """The model's last session where it fits and nobody uses it, or a new one."""
    key = (*prompt.key, sampling)
    with _lock:
        last: tuple[Any, Session] | None = model.__dict__.pop("_session", None)
    if last is not None and last[0] == key and last[1].cache.max_length >= length:
        session = last[1]
    else:
        del last  # its memory serves the new one
        session = prompt.session(-(-length // LENGTH_STEP) * LENGTH_STEP)
    yield session
    with _lock:  # one that failed is not used again
        model.__dict__["_session"] = (key, session)
