"""Group `prefill`: Llama 3.2 1B and Llama 3 8B read a prompt, bfloat16, random weights; logits of the last position."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import run_model
from benchmarks.runner import Case, Record, Session

COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "use_cache": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": COMMON
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def cases() -> Iterator[Case]:
    for model in MODELS:
        for seq in (512, 2048):
            name = f"{model}-prefill-b1-s{seq}"
            yield Case(name, partial(_run, name=name, model_name=model, seq=seq))


def _run(session: Session, *, name: str, model_name: str, seq: int) -> list[Record]:
    model, inputs = llama(model_name, seq)
    # float64 copies of 8 billion weights do not fit; optimize() itself verifies every rewritten value.
    small = model_name == "llama-1b"
    return run_model(session, name, model, inputs, check=small)


def llama(
    name: str, seq: int, device: str = "cuda", layers: int | None = None, vocabulary: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """One of MODELS, or its first layers, or with fewer words, made where it runs, and a prompt of `seq` tokens for
    it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name])
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.vocab_size = vocabulary or config.vocab_size
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, config.vocab_size, (1, seq), device=device)
    return model, {"input_ids": ids, "logits_to_keep": 1}
