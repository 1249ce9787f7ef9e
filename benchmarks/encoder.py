"""Group `encoder`: BERT-base in float16 on a GPU, with the padding mask that a tokenizer gives (all ones here)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu import run_model
from benchmarks.runner import Case, Record, Session
from tests.zoo import BIG

SHAPES = ((1, 128), (1, 384), (32, 128))


def cases() -> Iterator[Case]:
    for batch, seq in SHAPES:
        name = f"bert-base-fp16-b{batch}-s{seq}"
        yield Case(name, partial(_run, name=name, batch=batch, seq=seq))


def _run(session: Session, *, name: str, batch: int, seq: int) -> list[Record]:
    case = BIG["bert-base"]
    model = case.build().to("cuda", torch.float16)
    inputs = {key: value.cuda() for key, value in case.inputs(batch, seq, torch.float16).items()}
    return run_model(session, name, model, inputs)
