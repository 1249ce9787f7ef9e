"""Group `blocks`: the attentions and the decoder block of a notebook that follows blocks down to kernels, bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.gpu import run_model
from benchmarks.runner import Case, Record, Session
from tests.zoo.case import hidden, seeded
from tests.zoo.plain import DecoderBlock, MultiHeadSelfAttention, SelfAttention

BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "notebook-attention-d512-b8-s512": (partial(SelfAttention, 512), 512, 8, 512),
    "notebook-mha-d512-b8-s512": (partial(MultiHeadSelfAttention, 512, 8), 512, 8, 512),
    "notebook-block-d512-b8-s512": (partial(DecoderBlock, 512, 8, False), 512, 8, 512),
    "notebook-block-d512-b1-s128": (partial(DecoderBlock, 512, 8, False), 512, 1, 128),
    "notebook-block-d1024-b8-s512": (partial(DecoderBlock, 1024, 16, False), 1024, 8, 512),
}


def cases() -> Iterator[Case]:
    for name in BLOCKS:
        yield Case(name, partial(_run, name=name))


def _run(session: Session, *, name: str) -> list[Record]:
    build, width, batch, seq = BLOCKS[name]
    model = seeded(build()).to("cuda", torch.bfloat16)
    mask = torch.ones(seq, seq, device="cuda", dtype=torch.bool).tril()
    return run_model(session, name, model, {"x": hidden(batch, seq, width, torch.bfloat16).cuda(), "mask": mask})
