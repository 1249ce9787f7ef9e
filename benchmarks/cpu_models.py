"""Group `cpu-models`: whole models on the CPU, Burnish against eager, torch.compile and ONNX Runtime.

Real weights where a package ships them (MiniLM), random ones from the config elsewhere. Every variant's output is
checked against eager by the numerics rule before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import variants
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from tests.zoo import BIG

SHAPES = {
    "minilm": ((1, 16), (1, 128), (8, 128)),
    "bert-base": ((1, 128),),
    "gpt2": ((1, 128),),
    "llama-4x1024": ((1, 128),),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for model, shapes in SHAPES.items():
        for short, dtype in DTYPES.items():
            for batch, seq in shapes:
                name = f"{model} {short} b{batch} s{seq}"
                yield Case(name, partial(_run, name=name, model_name=model, dtype=dtype, batch=batch, seq=seq))


@torch.no_grad()
def _run(session: Session, *, name: str, model_name: str, dtype: torch.dtype, batch: int, seq: int) -> list[Record]:
    torch.compiler.reset()  # what an earlier case compiled must not make this one's shapes dynamic
    case = BIG[model_name]
    model = case.build().to(dtype)
    inputs = case.inputs(batch, seq, dtype)
    truth = numerics.oracle(copy.deepcopy(model).double(), **inputs)

    ready, outputs = {}, {}
    for variant, build in variants.for_dtype(dtype).items():
        session.console.print(f"  preparing {variant}", style="dim")
        ready[variant] = build(model, inputs)
        outputs[variant] = ready[variant]()

    wrong = {variant: reason for variant, reason in verdicts(outputs, outputs["eager"], truth).items() if reason}
    if "burnish" in wrong:
        raise CheckError(f"burnish: {wrong['burnish']}")
    del outputs
    result = session.time(ready)
    session.console.print(result)
    for variant, reason in wrong.items():
        session.console.print(f"  {variant} is timed although its numbers are off: {reason}", style="yellow")
    records = result.records(name, session.command(name))
    # A peer that computes worse numbers than the rule allows is still what people would run: timed, and said beside it.
    return [{**record, "inaccurate": wrong.get(record["variant"])} for record in records]
