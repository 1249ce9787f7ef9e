"""Generation by encoder-decoders: the encoder and the first token in one call, then a token at a time, each of which
reads what the first call left of the encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.runtime.encoder_decoder_cache import EncoderDecoderKVCache
from burnish.runtime.module import OptimizedModule
from burnish.runtime.session import Sampling, Session

SOURCE_STEP = 64
"""Sources are padded to a multiple of so many tokens: a session, and its captured step, serves them all."""


class EncoderDecoderSession(Session):
    """A `Session` of an encoder-decoder, for sources of one length.

    Args:
        source_name: how the model calls the encoder's input.
        source_mask: (batch, source length) int64, which tokens of the source are real; None for a model that takes no
            mask. Each prompt's is written into it.
    """

    def __init__(
        self,
        model: OptimizedModule,
        cache: EncoderDecoderKVCache,
        sampling: Sampling,
        source_name: str,
        source_mask: Tensor | None,
    ) -> None:
        super().__init__(model, cache.batch, cache.max_length, False, sampling, cache)
        self._source_name, self._source_mask = source_name, source_mask
        self._encoded: Tensor | None = None  # nothing of it is read but its sizes

    def prefill_from(
        self, source: Tensor, source_mask: Tensor | None, tokens: Tensor, seed: int, last: bool = False
    ) -> Tensor:
        """`prefill` of the decoder's first tokens, (batch, length), behind a source."""
        self._begin(tokens, seed)
        if self._source_mask is not None and source_mask is not None:
            self._source_mask.copy_(source_mask)
        result = self.model(**{self._source_name: source}, **self._common(tokens))
        encoded = result.encoder_last_hidden_state
        self._encoded = encoded.clone() if self._encoded is None else self._encoded.copy_(encoded)
        return self._first_token(result.logits[:, -1], last)

    def _call(self) -> dict[str, Any]:
        return {"encoder_outputs": (self._encoded,), **self._common(self._token)}

    def _common(self, tokens: Tensor) -> dict[str, Any]:
        call = {"decoder_input_ids": tokens, "past_key_values": self.cache, "use_cache": True}
        return call if self._source_mask is None else call | {"attention_mask": self._source_mask}


def why_not(model: Any) -> list[str]:
    """Why an encoder-decoder of Hugging Face's is not served here; empty where it is."""
    from transformers import GenerationMixin

    kind = type(model)
    if not (getattr(kind, "_can_compile_fullgraph", False) and getattr(kind, "_supports_sdpa", False)):
        return [f"{kind.__name__} takes no static cache"]
    if model.config.model_type == "whisper":
        return []
    if kind.generate is not GenerationMixin.generate:
        return [f"{kind.__name__} has a generate of its own"]
    return [] if model.main_input_name == "input_ids" else [f"{kind.__name__} takes {model.main_input_name}"]


def first_tokens(model: Any, batch: int, given: Tensor | None, config: Any, device: torch.device) -> Tensor:
    """What the decoder begins with, (batch, length): the tokens given, behind the start token where that is missing."""
    if given is not None and (given.dim() != 2 or given.shape[0] != batch or given.numel() == 0):
        raise ValueError(
            f"decoder_input_ids has shape {tuple(given.shape)}; it must be ({batch}, length), a row for each source"
        )
    model._prepare_special_tokens(config, True, device=device, batch_size=batch)
    options = {} if given is None else {"decoder_input_ids": given.to(device)}
    start = config._decoder_start_token_tensor
    tokens, _ = model._prepare_decoder_input_ids_for_generation(batch, model.main_input_name, options, start, device)
    return tokens.to(torch.int64)


def padded_source(ids: Tensor, mask: Tensor | None, pad: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """The source and its mask, padded on the right to a multiple of SOURCE_STEP where there are so many positions."""
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"inputs has shape {tuple(ids.shape)}; it must be (batch, length), not empty")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; for inputs of {tuple(ids.shape)} it must have the same"
        )
    length = ids.shape[1]
    if limit is not None and length > limit:
        raise ValueError(f"inputs has {length} tokens; the model has {limit} positions")
    mask = torch.ones_like(ids) if mask is None else (mask != 0).to(torch.int64)
    more = min(-length % SOURCE_STEP, (limit or length + SOURCE_STEP) - length)
    return F.pad(ids, (0, more), value=pad), F.pad(mask, (0, more))
