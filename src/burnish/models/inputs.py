"""Inputs that fit a Hugging Face model: real text through its tokenizer, or made-up ids, pictures and sounds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.models.library import transformers_module
from burnish.models.wanted import DEFAULT_BATCH, DEFAULT_SEQ, ModelError, Wanted, converted


def tokenized(name: str, source: str, model: nn.Module, wanted: Wanted) -> dict[str, Any]:
    """The texts wanted, one row each, padded to the longest; ModelError for a model that reads none."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(f"--text: {name} does not read text")
    tokenizer = transformers_module().AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(wanted.seq or tokenizer.model_max_length, longest(model) or tokenizer.model_max_length)
    encoded = tokenizer(list(wanted.text), padding=True, truncation=True, max_length=most, return_tensors="pt")
    accepted = _parameters(model)
    inputs = {key: value.to(wanted.device) for key, value in encoded.items() if key in accepted}
    return {**inputs, **_beside_the_input(model, len(wanted.text), _seq(model, wanted), wanted.device)}


def made_up(name: str, model: nn.Module, wanted: Wanted) -> dict[str, Any]:
    """Made-up inputs of the sizes wanted: seeded token ids without padding, or a random picture or sound."""
    config: Any = model.config
    most = longest(model)
    batch, seq = wanted.batch or DEFAULT_BATCH, _seq(model, wanted)
    kind = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    has_seq = kind == "input_ids" or getattr(config, "is_encoder_decoder", False)
    if wanted.seq is not None and not has_seq:
        raise ModelError(f"--seq: {name} has no sequence length to choose; leave it out")
    if has_seq and most is not None and seq > most:
        raise ModelError(f"--seq={seq}: {name} has positions for {most} tokens; give {most} or less")
    inputs: dict[str, Any]
    if kind == "input_ids":
        ids = torch.randint(0, config.get_text_config().vocab_size, (batch, seq), generator=generator)
        inputs = {"input_ids": ids.to(wanted.device)}
        # A tokenizer gives encoders a mask of padding; a decoder alone is run without one.
        if "attention_mask" in _parameters(model) and (config.is_encoder_decoder or not _generates(model)):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif kind == "pixel_values" and hasattr(picture := getattr(config, "encoder", config), "image_size"):
        size = picture.image_size if isinstance(picture.image_size, (tuple, list)) else (picture.image_size,) * 2
        inputs = {kind: torch.randn(batch, picture.num_channels, *size, generator=generator)}
    elif kind == "input_features" and hasattr(config, "max_source_positions"):
        inputs = {kind: torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    else:
        raise ModelError(
            f"{name} reads {kind!r}, for which there is no made-up input; write a function that returns "
            "(model, inputs) and give package.module:function"
        )
    inputs = {key: converted(value, wanted.device, next(model.parameters()).dtype) for key, value in inputs.items()}
    return {**inputs, **_beside_the_input(model, batch, seq, wanted.device)}


def _beside_the_input(model: nn.Module, batch: int, seq: int, device: torch.device) -> dict[str, Any]:
    """What the decoder of an encoder-decoder reads; no cache of keys and values for a single pass."""
    config: Any = model.config
    beside: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False):
        words = config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, words, (batch, seq), generator=torch.Generator().manual_seed(1))
        beside["decoder_input_ids"] = ids.to(device)
    if "use_cache" in _parameters(model):
        beside["use_cache"] = False
    return beside


def _generates(model: Any) -> bool:
    return bool(model.can_generate())


def _seq(model: nn.Module, wanted: Wanted) -> int:
    return wanted.seq or min(DEFAULT_SEQ, longest(model) or DEFAULT_SEQ)


def longest(model: nn.Module) -> int | None:
    """The most tokens that the model has positions for; None where it has no limit."""
    config = getattr(model, "config", None)
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((limit for limit in limits if isinstance(limit, int)), None)


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
