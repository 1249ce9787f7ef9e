"""`EncoderDecoderKVCache`: a `KVCache` for a decoder's own tokens, and one for what it reads of the encoder, which the
first call fills and later calls only read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import EncoderDecoderCache

from burnish.runtime.kv_cache import CacheState, KVCache, tensor_names


class EncodedKVCache(KVCache):
    """Keys and values of an encoder's output, for each layer of the decoder: all positions are written at once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if key_states.shape[2] != self.max_length:
            raise ValueError(
                f"past_key_values has memory for {self.max_length} positions of the encoder's output, which has "
                f"{key_states.shape[2]}: make it with source_length={key_states.shape[2]}, or pad the source"
            )
        return super().update(key_states, value_states, layer_idx)


class EncoderDecoderKVCache(EncoderDecoderCache, CacheState):
    """A static cache for one batch of an encoder-decoder.

    A Hugging Face model takes it as `past_key_values`, whether optimized or not. Its first call, with the encoder's
    inputs or with `encoder_outputs`, fills both parts; later calls add to the first part. An optimized model advances
    it after each call; so does `advance()` after calls of any other model.

    Args:
        self_attention_cache: of the decoder's tokens.
        cross_attention_cache: of the encoder's output, whose length is its `max_length`.
    """

    def __init__(self, self_attention_cache: KVCache, cross_attention_cache: EncodedKVCache) -> None:
        # Not EncoderDecoderCache's own, which asks the device whether there is something in each layer.
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        self.is_updated: dict[int, bool] = {}
        self._know_what_is_there()

    @classmethod
    def of(cls, model: Any, batch: int, max_length: int, source_length: int) -> EncoderDecoderKVCache:
        """An empty cache for a Hugging Face encoder-decoder, in the model's dtype and on its device.

        Args:
            max_length: how many tokens of the decoder there can be.
            source_length: how many positions the encoder's output has; for Whisper `config.max_source_positions`.

        ValueError for sizes below 1.
        """
        own = KVCache.of(model, batch, max_length)
        if source_length < 1:
            raise ValueError(f"source_length={source_length}: it must be at least 1")
        return cls(own, EncodedKVCache.of(model, batch, source_length))

    @property
    def batch(self) -> int:
        return self.self_attention_cache.batch

    @property
    def max_length(self) -> int:
        return self.self_attention_cache.max_length

    @property
    def source_length(self) -> int:
        return self.cross_attention_cache.max_length

    @property
    def lengths(self) -> Tensor:
        return self.self_attention_cache.lengths

    @property
    def filled(self) -> int:
        return self.self_attention_cache.filled

    @filled.setter
    def filled(self, tokens: int) -> None:
        self.self_attention_cache.filled = tokens

    @property
    def is_empty(self) -> bool:
        return self.self_attention_cache.is_empty

    def check_room(self, tokens: int) -> None:
        """ValueError where so many more tokens of the decoder do not fit."""
        self.self_attention_cache.check_room(tokens)

    def new_tokens(self, call: Mapping[str, Any]) -> int:
        return self.self_attention_cache.new_tokens(call)

    def take_over(self, made: EncoderDecoderKVCache) -> None:
        self.self_attention_cache.take_over(made.self_attention_cache)
        self.cross_attention_cache.take_over(made.cross_attention_cache)

    def advance(self, tokens: int) -> None:
        """So many tokens more are filled, and the encoder's part is."""
        self.self_attention_cache.advance(tokens)
        if self.cross_attention_cache.is_empty:
            self.cross_attention_cache.advance(self.source_length)
        self._know_what_is_there()

    def reset(self) -> None:
        """Empties both parts; their memory stays where it is."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()
        self._know_what_is_there()

    def grow(self, max_length: int) -> None:
        """Moves the decoder's tokens to larger memory. ValueError where that would not be larger."""
        self.self_attention_cache.grow(max_length)

    def _know_what_is_there(self) -> None:
        """For Hugging Face's models, which do not read the encoder's output again where a layer is updated."""
        there = not self.cross_attention_cache.is_empty
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache)), there)


_Context = tuple[int, int]  # of each part, whether there is something in it: that makes another graph


def _flatten(cache: EncoderDecoderKVCache) -> tuple[list[Tensor], _Context]:
    own, encoded = cache.self_attention_cache, cache.cross_attention_cache
    return [*own.tensors(), *encoded.tensors()], (int(not own.is_empty), int(not encoded.is_empty))


def _flatten_with_keys(cache: EncoderDecoderKVCache) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], _Context]:
    tensors, context = _flatten(cache)
    names = tensor_names(len(cache))
    names += [f"encoded_{name}" for name in names]
    return list(zip(map(pytree.GetAttrKey, names), tensors, strict=True)), context


def _unflatten(leaves: Iterable[Tensor], context: _Context) -> EncoderDecoderKVCache:
    tensors, (filled, encoded) = list(leaves), context
    half = len(tensors) // 2  # one layer of the decoder has both
    return EncoderDecoderKVCache(
        KVCache.of_tensors(tensors[:half], filled), EncodedKVCache.of_tensors(tensors[half:], encoded)
    )


pytree.register_pytree_node(
    EncoderDecoderKVCache,
    _flatten,
    _unflatten,
    serialized_type_name="burnish.EncoderDecoderKVCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
