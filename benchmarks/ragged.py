"""Group `ragged`: encoders on batches of unequal lengths, padded as a tokenizer pads them, with and without padding.

Lengths are uniform from 16 to 128 tokens of 128. "burnish, padded" and "burnish" are the same model optimized with
padding="keep" and padding="remove", timed in turn in one run. Real tokens are checked against eager by the numerics
rule before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import burnish
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.models import MINILM, Wanted, load
from tests.zoo import BIG

_SHORTEST, _LONGEST = 16, 128


def cases() -> Iterator[Case]:
    for batch in (8, 32):
        name = f"minilm fp32 b{batch} s16-128"
        yield Case(name, partial(_minilm, name=name, batch=batch))
    if torch.cuda.is_available():
        name = "bert-base-fp16-b32-s16-128"
        yield Case(name, partial(_bert, name=name, batch=32))


def batch_of(batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """Token ids, right padded, and their mask; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(_SHORTEST, _LONGEST + 1, (batch,), generator=generator)
    mask = (torch.arange(_LONGEST) < lengths[:, None]).long()
    ids = torch.randint(1000, 30_000, (batch, _LONGEST), generator=generator) * mask
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: value.to(device) for name, value in given.items()}


def _minilm(session: Session, *, name: str, batch: int) -> list[Record]:
    model = load(MINILM, Wanted(device=torch.device("cpu"))).model
    return _run(session, name, model, batch_of(batch))


def _bert(session: Session, *, name: str, batch: int) -> list[Record]:
    return _run(session, name, BIG["bert-base"].build().to("cuda", torch.float16), batch_of(batch, "cuda"))


def _run(session: Session, name: str, model: nn.Module, inputs: dict[str, Any]) -> list[Record]:
    real = inputs["attention_mask"].bool()
    ready: dict[str, Callable[[], Any]] = {}
    optimized = {
        "burnish, padded": burnish.optimize(copy.deepcopy(model)),
        "burnish": burnish.optimize(copy.deepcopy(model), padding="remove"),
    }
    with torch.no_grad():
        truth = numerics.oracle(copy.deepcopy(model).double(), **inputs)[0][real]
        for variant, fast in {"eager": model, **optimized}.items():
            session.console.print(f"  preparing {variant}", style="dim")
            fast(**inputs)
            ready[variant] = partial(fast, **inputs)
        outputs = {variant: run()[0][real] for variant, run in ready.items()}
        for variant, reason in verdicts(outputs, outputs["eager"], truth).items():
            if reason:
                raise CheckError(f"{variant}: {reason}")
        result = session.time(ready)
    session.console.print(result)
    session.console.print(f"  {optimized['burnish'].serving.served[0].padding}", style="dim")  # type: ignore[attr-defined]
    return result.records(name, session.command(name))
