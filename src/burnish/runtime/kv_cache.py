"""`KVCache`: keys and values of earlier tokens, in memory that is allocated once and that Hugging Face models take as
their `past_key_values`.

How many positions are filled is a number on the device: a captured step serves every length. It stays as it is while
a model runs, whose layers all write from there on, and is advanced once by whoever called the model.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

from burnish.runtime.module import State

if TYPE_CHECKING:
    from typing_extensions import Self

LENGTH_STEP = 256
"""`generate` makes caches for a multiple of so many tokens, so that the next prompt finds one that fits."""

_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


class CacheState(State):
    """What caches do as a `State`: a call's result has them in the place of what its graph made of them."""

    def put_into(self, result: Any) -> Any:
        """The result of a call with the cache, which takes over what was not written into it in place."""
        if isinstance(result, dict):
            if isinstance(made := result.get("past_key_values"), type(self)):
                self.take_over(made)
                result["past_key_values"] = self
            return result
        for made in result:
            if isinstance(made, type(self)):
                self.take_over(made)
        return tuple(self if isinstance(part, type(self)) else part for part in result)

    @abstractmethod
    def take_over(self, made: Any) -> None:
        """Copies what is elsewhere in `made`, a cache of the same kind and sizes."""


class KVCache(Cache, CacheState):
    """A static cache for one batch.

    A Hugging Face model takes it as `past_key_values`, whether optimized or not. An optimized one fills it in place and
    advances it after each call; so does `advance()` after calls of any other model.

    Args:
        keys, values: for each layer (batch, key heads, max length, head_dim), contiguous, finite everywhere.
        lengths: a 0-dim int64 tensor on their device: how many positions are filled, padding included.
        filled: the same as far as the host knows; 0 for a new cache.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, filled: int = 0) -> None:
        self.lengths, self.filled = lengths, filled
        super().__init__(layers=[_Layer(self, k, v) for k, v in zip(keys, values, strict=True)])

    @classmethod
    def of(cls, model: Any, batch: int, max_length: int) -> Self:
        """An empty cache for a Hugging Face model's decoder, in the model's dtype and on its device.

        ValueError for sizes below 1.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch={batch}, max_length={max_length}: both must be at least 1")
        config = model.config.get_text_config(decoder=True)
        layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads //= getattr(model, "ranks_sharing_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(p for p in model.parameters() if p.is_floating_point())

        def empty() -> Tensor:  # what is not filled must be finite
            return weight.new_zeros(batch, heads, max_length, width)

        lengths = torch.zeros((), dtype=torch.int64, device=weight.device)
        return cls([empty() for _ in range(layers)], [empty() for _ in range(layers)], lengths)

    @property
    def batch(self) -> int:
        size: int = self.layers[0].keys.shape[0]
        return size

    @property
    def max_length(self) -> int:
        size: int = self.layers[0].keys.shape[2]
        return size

    @property
    def is_empty(self) -> bool:
        return self.filled == 0

    def tensors(self) -> list[Tensor]:
        """All that there is: keys and values of each layer, and `lengths`."""
        return [*(tensor for layer in self.layers for tensor in (layer.keys, layer.values)), self.lengths]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], filled: int) -> Self:
        """A cache of what `tensors` gives."""
        return cls(list(tensors[:-1:2]), list(tensors[1:-1:2]), tensors[-1], filled)

    def check_room(self, tokens: int) -> None:
        """ValueError where so many more tokens do not fit: the device would not say so."""
        if self.filled + tokens > self.max_length:
            raise ValueError(
                f"past_key_values holds {self.filled} of at most {self.max_length} tokens: {tokens} more do not fit; "
                f"make it with max_length={self.filled + tokens} or more, or call grow()"
            )

    def new_tokens(self, call: Mapping[str, Any]) -> int:
        inputs = next((call[name] for name in _TOKENS if call.get(name) is not None), None)
        if inputs is None:
            raise ValueError(f"a call with a KVCache needs one of {', '.join(_TOKENS)}")
        tokens = int(inputs.shape[1])
        self.check_room(tokens)
        return tokens

    def take_over(self, made: KVCache) -> None:
        for mine, other in zip(self.layers, made.layers, strict=True):
            for to, tensor in ((mine.keys, other.keys), (mine.values, other.values)):
                if to.data_ptr() != tensor.data_ptr():
                    to.copy_(tensor)

    def advance(self, tokens: int) -> None:
        """So many tokens more are filled."""
        self.lengths.add_(tokens)
        self.filled += tokens

    def reset(self) -> None:
        """Empties the cache; its memory stays where it is."""
        self.lengths.zero_()
        self.filled = 0

    def grow(self, max_length: int) -> None:
        """Moves what is filled to larger memory. ValueError where that would not be larger."""
        if max_length <= self.max_length:
            raise ValueError(f"max_length={max_length}: it must be above the {self.max_length} that there are")
        for layer in self.layers:
            layer.keys, layer.values = (_grown(t, max_length, self.filled) for t in (layer.keys, layer.values))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens are filled: 0 of an empty cache, else a tensor."""
        return 0 if self.is_empty else self.lengths

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length


class _Layer(CacheLayerMixin):
    is_sliding = False  # a window is the attention's business: all positions are kept
    is_compileable = True  # to Hugging Face: a mask is needed even for one token, because not all positions are filled

    def __init__(self, cache: KVCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes them behind what is filled. What is to be attended to: they alone in an empty cache, else all."""
        lengths, appended = self.cache.lengths, _appended.get()
        if self.keys.shape[2] != self.cache.max_length:  # in a capture: one free size, not one for each layer
            raise ValueError("all layers of a cache must have the same max_length")
        if appended is None:
            position = lengths + torch.arange(key_states.shape[2], device=key_states.device)
            self.keys.index_copy_(2, position, key_states)
            self.values.index_copy_(2, position, value_states)
        else:
            from burnish.ops import append_kv

            self.keys, self.values = append_kv(self.keys, self.values, key_states, value_states, lengths)
        if self.cache.is_empty:
            return key_states, value_states
        if appended is not None:
            appended.append((self.keys, lengths))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cache.is_empty else self.keys.shape[2]), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, where it is in memory."""
        for tensor in (self.keys, self.values):
            filled = tensor[:, :, : self.cache.filled]
            filled.copy_(filled.index_select(0, beam_idx.to(filled.device)))

    def get_seq_length(self) -> Any:
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        return self.cache.max_length


_appended: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("appended", default=None)


@contextlib.contextmanager
def appending() -> Iterator[None]:
    """Within the `with`, caches are appended to by the Op: nothing is written in place."""
    token = _appended.set([])
    try:
        yield
    finally:
        _appended.reset(token)


def appended() -> list[tuple[Tensor, Tensor]]:
    """What a model may attend to within `appending`, as it goes on: whole caches of keys, each with the number of
    positions that were filled before."""
    found = _appended.get()
    return [] if found is None else found


def _grown(tensor: Tensor, max_length: int, filled: int) -> Tensor:
    grown = tensor.new_zeros(*tensor.shape[:2], max_length, tensor.shape[3])
    grown[:, :, :filled] = tensor[:, :, :filled]
    return grown


def tensor_names(layers: int) -> list[str]:
    """Those of a cache's `tensors()`."""
    return [*(f"{name}{i}" for i in range(layers) for name in ("keys", "values")), "lengths"]


def _flatten(cache: KVCache) -> tuple[list[Tensor], int]:
    """Of what the host knows only whether it is empty makes another graph."""
    return cache.tensors(), 0 if cache.is_empty else 1


def _flatten_with_keys(cache: KVCache) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], int]:
    tensors, filled = _flatten(cache)
    return list(zip(map(pytree.GetAttrKey, tensor_names(len(cache))), tensors, strict=True)), filled


def _unflatten(leaves: Iterable[Tensor], filled: int) -> KVCache:
    return KVCache.of_tensors(list(leaves), filled)


pytree.register_pytree_node(
    KVCache,
    _flatten,
    _unflatten,
    serialized_type_name="burnish.KVCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
