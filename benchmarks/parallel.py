"""Group `parallel`: Llama 3 8B divided between two GPUs (tensor parallel, NCCL) against one of them, bfloat16.

The processes are those of `torchrun`; what they do is in parallel_child.py. Times of one and of two GPUs are taken in
turn, in one run. Each rank says on stderr what it is at; one that is at it for too long ends with its tracebacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.runner import Case, CheckError, Record, Session
from benchmarks.startup import now, run_child
from burnish.bench import Benchmark, Timing
from burnish.hardware import device

RANKS = 2
ONE, TWO = "burnish, one GPU", "burnish"


def cases() -> Iterator[Case]:
    for name, what, tokens in (
        ("llama-8b-decode-b1-ctx1024-tp2", "decode", 1024),
        ("llama-8b-prefill-b1-s2048-tp2", "prefill", 2048),
    ):
        yield Case(name, partial(_run, name=name, what=what, tokens=tokens))


def _run(session: Session, *, name: str, what: str, tokens: int) -> list[Record]:
    if torch.cuda.device_count() < RANKS:
        raise CheckError(f"{RANKS} GPUs are needed; there are {torch.cuda.device_count()}")
    launcher = ("--standalone", f"--nproc-per-node={RANKS}", "-m", "benchmarks.parallel_child", what, str(tokens))
    found = run_child("torch.distributed.run", *launcher, environment={"OMP_NUM_THREADS": "8"}, shows_progress=True)
    timings = {variant: Timing(tuple(map(tuple, found["us"][variant]))) for variant in (TWO, ONE)}
    result = Benchmark(timings, device(measure=False), now())
    session.console.print(result)
    for note in found["notes"]:
        session.console.print(f"  {note}")
    records = result.records(name, session.command(name), kernels=found["kernels"])
    for record in records:
        record["floor_us"] = round(found["floor_us"] / (RANKS if record["variant"] == TWO else 1), 3)
    us = {record["variant"]: record["median_us"] for record in records}
    session.console.print(f"  {name}: {us[TWO]:.1f} us, {us[TWO] / us[ONE]:.3f} of one GPU")
    return records
