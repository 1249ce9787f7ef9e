"""Whisper's way to its prompt and to its result, for audio of one segment without timestamps, as transformers'
`WhisperGenerationMixin.generate` has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SERVED = ("language", "task", "is_multilingual", "temperature", "return_timestamps")
_NOT_SERVED = (
    "prompt_ids",
    "prompt_condition_type",
    "condition_on_prev_tokens",
    "compression_ratio_threshold",
    "logprob_threshold",
    "no_speech_threshold",
    "num_segment_frames",
    "time_precision",
    "time_precision_features",
    "return_token_timestamps",
    "return_segments",
    "force_unique_generate_call",
    "monitor_progress",
)
_THRESHOLDS = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")


def taken_from(options: dict[str, Any]) -> dict[str, Any]:
    """What Whisper's generate takes by name, apart from a GenerationConfig's fields; removed from the options."""
    return {name: options.pop(name) for name in (*_SERVED, *_NOT_SERVED) if name in options}


def why_not(model: Any, features: Tensor | None, config: Any, asked: dict[str, Any]) -> list[str]:
    """Why Hugging Face has to do it."""
    given = {name: asked[name] for name in _NOT_SERVED if asked.get(name) is not None and asked[name] is not False}
    reasons = [f"{name}={'...' if isinstance(value, Tensor) else repr(value)}" for name, value in given.items()]
    own = {name: getattr(config, name, None) for name in (*_THRESHOLDS, "force_unique_generate_call")}
    reasons += [f"{name}={value!r}" for name, value in own.items() if value and name not in asked]
    if isinstance(asked.get("temperature"), (list, tuple)):
        reasons.append("more than one temperature")
    timestamps = asked.get("return_timestamps")
    if timestamps or (timestamps is None and getattr(config, "return_timestamps", False)):
        reasons.append("return_timestamps=True")
    if features is not None and features.dim() == 3 and features.shape[2] > _frames(model):
        reasons.append(f"audio of {features.shape[2]} frames, more than a segment's {_frames(model)}")
    return reasons


def prepared(
    model: Any, features: Tensor, config: Any, asked: dict[str, Any], given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The features of one whole segment, and the tokens that the decoder begins with; `config` says then how many more
    there may be and whether they are drawn."""
    bins = model.config.num_mel_bins
    if features.dim() != 3 or features.shape[1] != bins or features.numel() == 0:
        raise ValueError(f"input_features has shape {tuple(features.shape)}; it must be (batch, {bins}, frames)")
    batch = features.shape[0]
    if given is not None and (given.dim() != 2 or given.shape[0] != batch or given.numel() == 0):
        raise ValueError(
            f"decoder_input_ids has shape {tuple(given.shape)}; it must be ({batch}, length), a row for each source"
        )
    features = F.pad(features, (0, _frames(model) - features.shape[2]))
    config.return_timestamps = False
    names = {name: asked.get(name) for name in ("language", "task", "is_multilingual")}
    model._set_language_and_task(**names, generation_config=config)
    tokens = given
    if tokens is None:
        tokens = model._retrieve_init_tokens(
            features,
            batch_size=batch,
            generation_config=config,
            config=model.config,
            num_segment_frames=_frames(model),
            kwargs={},
        )
    model._set_max_new_tokens_and_length(config=model.config, decoder_input_ids=tokens, generation_config=config)
    temperature = asked.get("temperature")
    config.do_sample = bool(temperature)
    config.temperature = temperature if temperature else 1.0
    return features, tokens.to(features.device, torch.int64)


def transcribed(sequences: Tensor, prompt: int, pad: int, eos: tuple[int, ...], config: Any) -> Tensor | None:
    """The new tokens of each row up to its end, padded on the right; None where there is a timestamp among them, by
    which Hugging Face cuts the audio."""
    begin = getattr(config, "no_timestamps_token_id", None)
    new = sequences[:, prompt:]
    if begin is not None and bool((new > begin).any()):
        return None
    rows = [_without_end(row, pad, eos) for row in new]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def _without_end(row: Tensor, pad: int, eos: tuple[int, ...]) -> Tensor:
    if int(row[-1]) == pad:
        padding = int((row == pad).sum()) - (1 if pad in eos else 0)
        row = row[: len(row) - padding]
    return row[:-1] if len(row) and int(row[-1]) in eos else row


def _frames(model: Any) -> int:
    encoder = model.model.encoder
    return int(model.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0])
