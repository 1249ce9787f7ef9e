"""Small encoder-decoders with random weights, and sources for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
FRAMES = 40
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_BART: dict[str, Any] = _COMMON | {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "bos_token_id": 1,
}
_T5: dict[str, Any] = _COMMON | {"d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def whisper(**more: Any) -> Any:
    config = {"num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_target_positions": 256}
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**_BART | config | {"eos_token_id": 2} | more)
    )
    model.generation_config.eos_token_id = None
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
    "t5 gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")
    ),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**_T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**_BART, max_position_embeddings=256, forced_bos_token_id=5, forced_eos_token_id=2)
    ),
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**_BART, max_position_embeddings=256, decoder_vocab_size=VOCABULARY)
    ),
    "m2m": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(**_BART | {"max_position_embeddings": 256, "pad_token_id": 1})
    ),
}


def built(make: Callable[[], Any]) -> Any:
    """With weights large enough that what comes next depends on all before."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.2)
    return model


def source(length: int = 11, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(ids: Tensor, real: int = 7) -> Tensor:
    """A mask of the second row's first tokens alone."""
    mask = torch.ones_like(ids)
    mask[1, real:] = 0
    return mask


def audio(batch: int = 2, seed: int = 1, frames: int = FRAMES) -> Tensor:
    return torch.randn(batch, 8, frames, generator=torch.Generator().manual_seed(seed))
