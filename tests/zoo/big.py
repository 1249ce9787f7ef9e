"""Models at the sizes that people run, for benchmarks: seeded weights (MiniLM: its real ones) and no padding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .case import Case, Inputs, Stack, token_ids
from .hugging_face import (
    BERT_OPS,
    BERT_OUTSIDE,
    GPT2_OPS,
    GPT2_OUTSIDE,
    HF,
    IDS,
    IDS_MASK,
    LLAMA_OPS,
    LLAMA_OUTSIDE,
    MINILM,
    SENTENCES,
    bert,
    gpt2,
    llama_like,
    tokenized,
)

SHAPES = ((1, 128), (8, 128))


def paragraphs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of real text long enough to fill `seq`, so that a benchmark times no padding."""
    once = " ".join(SENTENCES)
    return tokenized([f"{SENTENCES[row % len(SENTENCES)]} {once * (1 + seq // 80)}" for row in range(batch)], seq)


def full_text(vocab: int, *, mask: bool) -> Inputs:
    """Token ids without padding; with `mask` the all-ones padding mask that a tokenizer adds."""

    def inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
        ids = {"input_ids": token_ids(batch, seq, vocab)}
        return {**ids, "attention_mask": torch.ones(batch, seq, dtype=torch.long)} if mask else ids

    return inputs


def cases() -> list[Case]:
    """Every big model of the zoo."""
    bert_base: dict[str, Any] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    gpt2_small: dict[str, Any] = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
    llama: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    }
    return [
        replace(MINILM, inputs=paragraphs, shapes=((1, 16), (1, 128), (8, 128))),
        Case(
            "bert-base",
            partial(bert, **bert_base),
            full_text(30522, mask=True),
            IDS_MASK,
            (Stack("encoder", 12, BERT_OPS),),
            BERT_OUTSIDE,
            shapes=SHAPES,
            marks=HF,
        ),
        Case(
            "gpt2",
            partial(gpt2, **gpt2_small),
            full_text(50257, mask=False),
            IDS,
            (Stack("decoder", 12, GPT2_OPS),),
            {**GPT2_OUTSIDE, "linear": 1},
            shapes=SHAPES,
            marks=HF,
        ),
        Case(
            "llama-4x1024",
            partial(llama_like, **llama),
            full_text(32000, mask=False),
            IDS,
            (Stack("decoder", 4, LLAMA_OPS),),
            LLAMA_OUTSIDE,
            shapes=SHAPES,
            marks=HF,
        ),
    ]
