"""What `generate` leaves to Hugging Face: the same method of theirs, on a model whose forward is the optimized one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from burnish.runtime.encoder_decoder_cache import EncoderDecoderKVCache
from burnish.runtime.kv_cache import LENGTH_STEP, KVCache
from burnish.runtime.module import OptimizedModule

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
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
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

# Where lengths that change make another graph of each step, or where a cache must be cut or its sizes are shown.
_AS_IT_WAS = {
    "num_beam_groups",
    "guidance_scale",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
}
_GIVEN_AS_IT_WAS = {
    "assistant_model",
    "past_key_values",
    "custom_generate",
    "negative_prompt_ids",
    "return_token_timestamps",
    "prefill_chunk_size",
    "cache_implementation",
}
_NOT_THE_MODELS = ("tokenizer", "assistant_tokenizer")  # of what Hugging Face hands on to a step
_ONE_TOKEN_A_STEP = ("greedy_search", "sample", "beam_search", "beam_sample")


def not_built(config: Any) -> Iterator[tuple[str, Any]]:
    """What the GenerationConfig asks for that only Hugging Face does."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral and (value is not False or neutral is True):
            yield name, value


def hugging_face(model: OptimizedModule, reasons: Sequence[str], config: Any, options: dict[str, Any]) -> Any:
    """What Hugging Face's `generate` returns. Each reason is told once for a model.

    Where that needs a cache of another kind than those of this package, it runs the model as it was.
    """
    as_it_was = any(name in _AS_IT_WAS for name, _ in not_built(config)) or any(
        options.get(name) is not None for name in _GIVEN_AS_IT_WAS
    )
    told: set[str] = model.__dict__.setdefault("_told", set())
    if fresh := [reason for reason in reasons if reason.split("=")[0] not in told]:
        told.update(reason.split("=")[0] for reason in fresh)
        how = ", with the model as it was" if as_it_was else ""
        warnings.warn(f"generate: left to Hugging Face{how}, because of {', '.join(fresh)}", stacklevel=4)
    if as_it_was:
        return model._original.generate(**options)
    proxy = _with_optimized_forward(model)
    result = proxy.generate(**options)
    if isinstance(result, Tensor) and proxy._kept_cache is not None:  # other results may show the cache
        model.__dict__["_fallback_cache"] = proxy._kept_cache
    return result


def _with_optimized_forward(model: OptimizedModule) -> Any:
    """The original with all that belongs to it, of a class whose forward is the optimized one."""
    kind: Any = _optimized_class(type(model._original))  # type: ignore[arg-type]
    proxy = kind.__new__(kind)
    last = model.__dict__.pop("_fallback_cache", None)  # no other call has it meanwhile
    proxy.__dict__ = model._original.__dict__ | {"_optimized": model, "_kept_cache": last}
    return proxy


@functools.cache
def _optimized_class(kind: Any) -> Any:
    """A subclass of a Hugging Face model's class whose instances have the model's OptimizedModule as `_optimized`."""
    own_masks = hasattr(kind, "create_masks_for_generate")
    methods = {
        "__call__": _call,
        "forward": functools.wraps(kind.forward)(_call),
        "_prepare_cache_for_generation": _prepare_cache,
        "_valid_auto_compile_criteria": lambda self, *args, **kwargs: False,
        **({} if own_masks else {"create_masks_for_generate": staticmethod(_masks)}),
    }
    made = type(kind)(kind.__name__, (kind,), methods | {"__module__": kind.__module__})
    made.__qualname__ = kind.__qualname__
    return made


def _call(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
    """As sessions call the model, so that they share their graphs."""
    from transformers.modeling_outputs import BaseModelOutput

    encoded = kwargs.get("encoder_outputs")
    if isinstance(encoded, BaseModelOutput) and len(encoded) == 1:
        kwargs["encoder_outputs"] = (encoded.last_hidden_state,)
    if return_dict is not None and return_dict != getattr(self.config, "return_dict", None):
        kwargs["return_dict"] = return_dict
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _NOT_THE_MODELS}
    return self.__dict__["_optimized"](*args, **given)


def _prepare_cache(
    self: Any, config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_length: int, *rest: Any
) -> Any:
    """A cache that stays where it is, where Hugging Face's would be one that grows."""
    model = self.__dict__["_optimized"]
    plain = config.cache_implementation is None and config.use_cache and config.prefill_chunk_size is None
    static = (
        plain and getattr(type(self), "_can_compile_fullgraph", False) and not getattr(config, "is_assistant", False)
    )
    if not static or model_kwargs.get("past_key_values") is not None or mode.value not in _ONE_TOKEN_A_STEP:
        kind = type(model._original)
        return kind._prepare_cache_for_generation(self, config, model_kwargs, mode, batch, max_length, *rest)
    rows = batch * max(config.num_beams or 1, config.num_return_sequences or 1)
    source = model_kwargs["encoder_outputs"][0].shape[1] if self.config.is_encoder_decoder else None
    last: tuple[Any, Any] | None = self._kept_cache
    if last is None or last[0] != (rows, source) or last[1].max_length < max_length:
        self._kept_cache = last = None  # its memory serves the new one
        room = -(-max_length // LENGTH_STEP) * LENGTH_STEP
        made = KVCache.of(model, rows, room) if source is None else EncoderDecoderKVCache.of(model, rows, room, source)
        last = self._kept_cache = ((rows, source), made)
    last[1].reset()
    model_kwargs["past_key_values"] = last[1]
    return None


def _masks(*, attention_mask: Tensor | None, past_key_values: Any, **kwargs: Any) -> Any:
    """The padding alone, in the sizes that every step has: the cache knows the rest."""
    from transformers.masking_utils import create_masks_for_generate

    if not isinstance(past_key_values, (KVCache, EncoderDecoderKVCache)):
        return create_masks_for_generate(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
    if attention_mask is None or past_key_values.is_empty:
        return attention_mask
    return F.pad(attention_mask, (0, past_key_values.max_length - attention_mask.shape[1]), value=1)
