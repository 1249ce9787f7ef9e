"""The zoo's entries for the plain PyTorch models of `plain.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import plain
from .case import BATCH, SEQ, Build, Case, Inputs, Stack, causal_mask, hidden, padding_mask, seeded, token_ids

WIDTH, HEADS, VOCAB = 64, 4, 101

NANO_OPS = {"attention": 1, "linear": 4, "activation": 1, "layer_norm": 2, "residual": 2}
ATTENTION_OPS = {"attention": 1, "linear": 2}


def states(name: str) -> Inputs:
    """Inputs of a module that takes hidden states alone, under the argument `name`."""
    return lambda batch, seq, dtype: {name: hidden(batch, seq, WIDTH, dtype)}


def states_axes(name: str) -> dict[str, tuple[str | int, ...]]:
    return {name: (BATCH, SEQ, WIDTH)}


def ids(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"ids": token_ids(batch, seq, VOCAB)}


def causal(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": hidden(batch, seq, WIDTH, dtype), "mask": causal_mask(seq)}


CAUSAL_AXES = {"x": (BATCH, SEQ, WIDTH), "mask": (SEQ, SEQ)}


def padded(heads: bool) -> tuple[Inputs, dict[str, tuple[str | int, ...]]]:
    """Inputs and axes with a padding mask that broadcasts over queries: (B, 1, S), or (B, 1, 1, S) over heads too."""
    ones = (1, 1) if heads else (1,)

    def inputs(batch: int, seq: int, dtype: torch.dtype) -> dict[str, Tensor]:
        mask = padding_mask(batch, seq).view(batch, *ones, seq)
        return {"x": hidden(batch, seq, WIDTH, dtype), "mask": mask}

    return inputs, {"x": (BATCH, SEQ, WIDTH), "mask": (BATCH, *ones, SEQ)}


def build(module: Callable[..., nn.Module], *args: object, **settings: object) -> Build:
    return lambda: seeded(module(*args, **settings))


def nano_cases() -> list[Case]:
    found = []
    for sdpa in (True, False):
        for bias in (True, False):
            name = f"nanogpt-{'sdpa' if sdpa else 'manual'}{'' if bias else '-nobias'}"
            model = build(plain.NanoGPT, 2, WIDTH, HEADS, max_seq=512, vocab=VOCAB, bias=bias, sdpa=sdpa)
            outside = {"layer_norm": 1, "linear": 1}
            found.append(Case(name, model, ids, {"ids": (BATCH, SEQ)}, (Stack("h", 2, NANO_OPS),), outside))
    block = build(plain.NanoBlock, WIDTH, HEADS, max_seq=512, bias=True, sdpa=True, dropout=0.1)
    return [*found, Case("nanogpt-block", block, states("x"), states_axes("x"), (Stack("block", 1, NANO_OPS),))]


def notebook_cases() -> list[Case]:
    attention = (Stack("attention", 1, ATTENTION_OPS),)
    block = (Stack("block", 1, NANO_OPS),)
    single, multi = build(plain.SelfAttention, WIDTH), build(plain.MultiHeadSelfAttention, WIDTH, HEADS)
    notes = "hidden scores are set to -1e3: a row that is hidden as a whole attends evenly"
    case = partial(Case, notes=notes)
    return [
        case("notebook-attention", single, causal, CAUSAL_AXES, attention),
        case("notebook-attention-padded", single, *padded(heads=False), attention),
        case("notebook-mha", multi, causal, CAUSAL_AXES, attention),
        case("notebook-mha-padded", multi, *padded(heads=True), attention),
        case("notebook-block-post", build(plain.DecoderBlock, WIDTH, HEADS, False), causal, CAUSAL_AXES, block),
        case("notebook-block-pre", build(plain.DecoderBlock, WIDTH, HEADS, True), causal, CAUSAL_AXES, block),
    ]


def cases() -> list[Case]:
    """Every plain model of the zoo."""
    mlp = (Stack("mlp", 1, {"linear": 3, "gated_mlp": 1}),)
    found = [*nano_cases(), *notebook_cases()]
    for activation, bias in (("silu", False), ("gelu", False), ("gelu_tanh", True)):
        model = build(plain.GatedMLP, WIDTH, 176, activation, bias)
        found.append(Case(f"gated-mlp-{activation}", model, states("x"), states_axes("x"), mlp))
    slapo_ops = {"attention": 1, "linear": 4, "layer_norm": 1, "residual": 1}
    return [
        *found,
        Case(
            "slapo-attention",
            build(plain.SlapoAttention, WIDTH, HEADS),
            states("hidden_states"),
            states_axes("hidden_states"),
            (Stack("attention", 1, slapo_ops),),
        ),
        Case(
            "sdpa-tutorial-attention",
            build(plain.CausalSelfAttention, WIDTH, HEADS),
            states("x"),
            states_axes("x"),
            (Stack("attention", 1, ATTENTION_OPS),),
            notes="causal in train mode only",
        ),
    ]
