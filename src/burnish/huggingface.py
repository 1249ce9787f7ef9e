"""Capture of Hugging Face models: padding and causality reach the `attention` Op as such, not as a materialised mask.

Source of the method: transformers' own extension points, `AttentionInterface` and `AttentionMaskInterface`. While a
model is captured, its configs name our implementation. Our mask function returns transformers' whole mask and
remembers, by that tensor's identity, what it means; our attention function recognises the tensor and hands the meaning
to the Op. Nobody reads the mask then, and dead-code elimination removes it. A mask that a model slices, casts or adds
to is another tensor: it stays a bias, slower and still right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NAME = "burnish"
_TAKEN_OVER = ("eager", "sdpa")
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_PLAIN = {"causal_mask_function", "bidirectional_mask_function", _WINDOW}


class NotExpressible(Exception):
    """The `attention` Op has no place for something that this model's attention does (soft capping, dropout, ...)."""


@dataclass(frozen=True)
class Meaning:
    """What a mask says: which keys are padding (batch, length; True = real), causality, window; and whether it is one
    over a whole KVCache, whose newest tokens the queries are."""

    mask: Tensor
    padding: Tensor | None
    is_causal: bool
    window: int | None
    cached: bool


@contextlib.contextmanager
def captured_attention(model: nn.Module, names_given: frozenset[str] = frozenset()) -> Iterator[bool]:
    """Within the `with`, Hugging Face attention in `model` is the `attention` Op; all settings are as before when it
    ends. Yields whether anything was taken over.

    Left as they are: models that are not Hugging Face's, that have attention code of their own, that use another
    implementation than eager or sdpa, or that are to return their attention weights.

    Args:
        names_given: names of the inputs that the caller passes. Position ids that the caller passes may mean packed
            sequences.
    """
    teach_pytree_caches()
    configs = _configs(model)
    if (
        not configs
        or "output_attentions" in names_given
        or any(getattr(c, "output_attentions", False) for c in configs)
    ):
        yield False
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    takeover = _Takeover(position_ids_given="position_ids" in names_given)
    before = [config._attn_implementation_internal for config in configs]
    ALL_ATTENTION_FUNCTIONS._global_mapping[NAME] = takeover.attention
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[NAME] = takeover.mask
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield True
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)


def teach_pytree_caches() -> None:
    """KV caches become pytrees, as transformers itself has it for export: a model returns one unless told not to. This
    adds two types to what torch knows and stays, because each call builds its result through it."""
    if "transformers" not in sys.modules:
        return
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    if DynamicCache not in pytree.SUPPORTED_NODES:
        register_dynamic_cache_export_support()
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            lambda cache: ([cache.self_attention_cache, cache.cross_attention_cache], None),
            lambda caches, context: EncoderDecoderCache(*caches),
            serialized_type_name="transformers.cache_utils.EncoderDecoderCache",
        )


def _configs(model: nn.Module) -> list[Any]:
    """The configs through which attention can be exchanged: of the models in `model` that use the attention
    interface."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    found = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation in _TAKEN_OVER:
            # Code of the model's own may read the mask of the implementation that the config names, and add it to its
            # scores.
            if not module._can_set_attn_implementation():
                return []
            found[id(module.config)] = module.config
    return list(found.values())


class _Takeover:
    """The attention and mask functions of one capture, and what they remember between them."""

    def __init__(self, position_ids_given: bool) -> None:
        self.meanings: list[Meaning] = []
        self.appended = _appended()
        # Positions that the model makes itself are one run, whatever tracing can see of it.
        self.known = _PLAIN if position_ids_given else _PLAIN | {_PACKED}

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        mask_function = mask_function or causal_mask_function
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        parts = {getattr(part, "__qualname__", ""): part for part in _parts(mask_function)}
        is_causal = "causal_mask_function" in parts
        # Only a KVCache's queries begin where only the device knows.
        cached = isinstance(q_offset, Tensor) and is_causal
        aligned = cached or (isinstance(q_offset, int) and q_offset == 0)
        plain = parts.keys() <= self.known and not kwargs.get("use_vmap") and aligned and kv_offset == 0
        if plain and (cached or not is_causal or _equal(q_length, kv_length)):
            window = _enclosed(parts[_WINDOW], "sliding_window") if _WINDOW in parts else None
            self.meanings.append(Meaning(mask, attention_mask, is_causal, window, cached))
        return mask

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(batch, heads, length, head_dim) in, (batch, length, heads, head_dim) out, as transformers' attention
        functions do it."""
        from burnish import ops
        from burnish.graph.autocast import autocast_dtypes

        given = [name for name in ("softcap", "s_aux", "cache", "cu_seq_lens_q") if kwargs.get(name) is not None]
        on_cpu = query.device.type == "cpu"  # where no kernel has dropout
        if given or (dropout and on_cpu):
            raise NotExpressible(f"{type(module).__name__} calls attention with {', '.join(given) or f'{dropout=}'}")
        bias, padding, window = position_bias, None, None
        known = next((meaning for meaning in self.meanings if meaning.mask is attention_mask), None)
        if attention_mask is None:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        elif known is not None:
            padding, causal, window = known.padding, known.is_causal, known.window
        else:
            causal = False
            bias = attention_mask if bias is None else _with_mask(bias, attention_mask)
        if known is not None and known.cached:
            if dropout:
                raise NotExpressible(f"{type(module).__name__} calls attention to a cache with {dropout=}")
            filled = next((before for keys, before in self.appended if keys is key), None)
            if filled is None:
                raise NotExpressible(f"{type(module).__name__} attends to something else than the cache it appended to")
            out = ops.cached_attention(query, key, value, filled + query.shape[2], padding, window, scaling, bias)
            return out.transpose(1, 2), None
        drawn = (dropout, ops.draw_seed(query.device)) if dropout else ()
        if dtype := dict(autocast_dtypes()).get(query.device.type):  # as PyTorch's; rotated queries come in float32
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        out = ops.attention(query, key, value, bias, padding, causal, window, scaling, *drawn)
        return out.transpose(1, 2), None


def _appended() -> list[tuple[Tensor, Tensor]]:
    """The keys of caches that were appended to in this capture, and how many tokens those held before."""
    kv_cache = sys.modules.get("burnish.runtime.kv_cache")
    return [] if kv_cache is None else kv_cache.appended()


def _equal(q_length: int | torch.SymInt, kv_length: int | torch.SymInt) -> bool:
    """Whether the lengths are equal in the call that is captured; the Program then serves only calls in which they are.

    Nothing else would say so yet: transformers takes the one from the token ids and the other from the padding mask.
    """
    hints = [length if isinstance(length, int) else length.node.hint for length in (q_length, kv_length)]
    return hints[0] == hints[1] and bool(q_length == kv_length)


def _parts(mask_function: Any) -> list[Any]:
    """The functions that a conjunction of mask functions is made of."""
    name = getattr(mask_function, "__qualname__", "")
    if name == "and_masks.<locals>.and_mask":
        return [part for conjunct in _enclosed(mask_function, "mask_functions") for part in _parts(conjunct)]
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _parts(_enclosed(mask_function, "mask_function"))
    return [mask_function]


def _enclosed(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _with_mask(bias: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)
