"""What the parallel group runs on each rank, under torchrun; the first prints one line of JSON at the end."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import burnish
from benchmarks.decode import Steps, floor_us
from benchmarks.gpu import kernels_of, model_floor_us
from benchmarks.parallel import ONE, TWO
from benchmarks.prefill import llama
from benchmarks.runner import CheckError, verdicts
from burnish import numerics
from burnish.parallel import tensor_parallel
from burnish.served import Served

ROUNDS, CALLS = 5, 8
AT_ONCE = {"decode": 20, "prefill": 1}  # calls that follow each other, as steps of generation do


@torch.no_grad()
def main(what: str, tokens: int) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    check()
    runs: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    floor = 0.0
    for variant in (ONE, TWO):
        model, inputs = llama("llama-8b", tokens)
        if variant == ONE:
            decode = what == "decode"
            floor = floor_us(model, 1, tokens) if decode else model_floor_us(model, tokens, torch.bfloat16)
        else:
            tensor_parallel(model)
        if variant == TWO or dist.get_rank() == 0:
            fast: Any = burnish.optimize(model)
            runs[variant] = prepared(what, fast, model, inputs)
            notes += [f"{variant}: {line}" for line in described(fast.schedule.served[-1])]
        dist.barrier()
    us: dict[str, list[list[float]]] = {variant: [] for variant in runs}
    for _ in range(ROUNDS):
        for variant in (ONE, TWO):
            dist.barrier()
            if variant in runs:
                us[variant].append(timed(runs[variant], AT_ONCE[what]))
    kernels = {}
    for variant in (ONE, TWO):
        dist.barrier()
        if variant in runs:
            kernels[variant] = len(kernels_of(runs[variant]))
    if dist.get_rank() == 0:
        print(json.dumps({"us": us, "kernels": kernels, "floor_us": floor, "notes": notes}))
    dist.destroy_process_group()


def check() -> None:
    """The logits of two layers of the model, by the numerics rule."""
    model, inputs = llama("llama-8b", 128, layers=2)
    eager = model(**inputs).logits
    true = numerics.oracle(model.double(), **inputs).logits
    divided, _ = llama("llama-8b", 128, layers=2)
    fast = burnish.optimize(tensor_parallel(divided))
    if reason := verdicts({TWO: fast(**inputs).logits}, eager, true)[TWO]:
        raise CheckError(f"on two GPUs: {reason}")


def prepared(what: str, fast: Any, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], object]:
    """What is to be timed, after its first calls."""
    if what == "decode":
        model.config.use_cache = True  # type: ignore[union-attr]
        run: Callable[[], object] = Steps(fast, inputs["input_ids"]).step
    else:

        def run() -> object:
            return fast(**inputs)

    for _ in range(3):
        run()
    return run


def described(served: Served) -> list[str]:
    """By which Impls a call is served, and what it is served without."""
    chosen = Counter((slot.rpartition("_")[0], choice.candidate) for slot, choice in served.choices.items())
    lines = [f"{count} x {op} by {candidate}" for (op, candidate), count in chosen.items()]
    for op, choice in {slot.rpartition("_")[0]: choice for slot, choice in served.choices.items()}.items():
        if op.startswith("all_reduce_add_"):  # what the exchange takes by each Impl, or why it cannot be by one
            lines += [f"{op} by {candidate}: {us} us" for candidate, us in choice.times_us.items()]
            lines += [f"{op} by {impl}: {'; '.join(reasons)}" for impl, reasons in choice.rejected.items()]
    return lines + [reason for reason in (served.kept_original, served.not_captured) if reason]


def timed(run: Callable[[], object], at_once: int) -> list[float]:
    """Microseconds of a call, several times; on every rank the same number of calls."""
    for _ in range(at_once):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(at_once):
            run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 / at_once for a, b in itertools.pairwise(events)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
