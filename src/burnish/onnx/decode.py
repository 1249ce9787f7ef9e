"""A decode step of a Hugging Face language model: new tokens and the past's keys and values in, logits and the
lengthened keys and values out, all of them plain tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from burnish.onnx.source import Source

_STEP = 2  # tokens of the example's step; the rest is its past


class DecodeStep(nn.Module):
    """One step, for prompt and new tokens alike.

    Inputs: input_ids (batch, sequence) int64; attention_mask (batch, past + sequence) int64, 0 for padding on the left;
    for each layer past keys and values (batch, key heads, past, head_dim), with past = 0 before the prompt.
    Outputs: "logits" (batch, sequence, vocabulary), and of each layer "present.<i>.key" and "present.<i>.value" (batch,
    key heads, past + sequence, head_dim). Positions are counted over the mask's real tokens, as Hugging Face's
    `generate` does it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> dict[str, Tensor]:
        positions = {}
        if self._takes_positions:
            counted = attention_mask.cumsum(-1) - 1
            positions["position_ids"] = counted.clamp(min=0)[:, -input_ids.shape[1] :]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=_cache_of(past),
            use_cache=True,
            **positions,
        )
        outputs = {"logits": out.logits}
        for i, layer in enumerate(out.past_key_values.layers):
            outputs |= {f"present.{i}.key": layer.keys, f"present.{i}.value": layer.values}
        return outputs


def decode_step(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Source:
    """The decode step of a Hugging Face language model, with the last tokens of `input_ids` as the step and what is
    before them as its past. ValueError for another model or other inputs."""
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "can_generate", bool)() or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"decode=True: {type(model).__name__} is no Hugging Face model that generates with a decoder alone"
        )
    named = inspect.signature(model.forward).bind(*args, **dict(kwargs or {})).arguments
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] <= _STEP:
        raise ValueError(f"decode=True: input_ids of (batch, length) are needed, more than {_STEP} tokens long")
    mask = torch.ones_like(ids) if mask is None else mask
    past = _past(model, ids[:, :-_STEP], mask[:, :-_STEP])
    names = [f"past_key_values.{i}.{kind}" for i in range(len(past) // 2) for kind in ("key", "value")]
    return Source(
        DecodeStep(model).eval(),
        (ids[:, -_STEP:], mask, *past),
        {},
        ["input_ids", "attention_mask", *names],
        {
            "input_ids": ("batch", "sequence"),
            "attention_mask": ("batch", "past_sequence + sequence"),
            **dict.fromkeys(names, ("batch", None, "past_sequence", None)),
        },
        ({"sequence": 1}, {"past_sequence": 0}),
        "model.",
    )


def _past(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(out, "past_key_values", None), "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "no such cache"
        raise ValueError(f"decode=True: {type(model).__name__} keeps other things than keys and values: {kinds}")
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _cache_of(past: tuple[Tensor, ...]) -> Any:
    """A cache that holds these tensors themselves: its own way to fill one would join them with empty ones first."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
