"""What the parallel group runs on each rank, under torchrun; the first prints one line of JSON at the end."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

import burnish
from benchmarks.decode import Steps, floor_us
from benchmarks.gpu import kernels_of, model_floor_us
from benchmarks.parallel import ONE, TWO
from benchmarks.prefill import llama
from benchmarks.processes import deadline, end_with_parent, say, say_where_it_ends
from benchmarks.runner import CheckError, verdicts
from burnish import numerics, tuning
from burnish.candidates import candidates_of
from burnish.op import Op
from burnish.parallel import set_up_symmetric_memory, tensor_parallel
from burnish.served import Served
from burnish.tuning import Tuner

ROUNDS, CALLS = 5, 8
AT_ONCE = {"decode": 20, "prefill": 1}  # calls that follow each other, as steps of generation do
SUM = "all_reduce_add_rms_norm"
FEW = 3  # of each Impl so many configs are tried, the most promising: all of a step's are 220, minutes of compiling
# What a stage may take before its tracebacks are wanted: to tune a model anew is to compile hundreds of kernels.
START_SECONDS, MAKE_SECONDS, TUNE_SECONDS, TIME_SECONDS = 60.0, 90.0, 300.0, 60.0


@torch.no_grad()
def main(what: str, tokens: int) -> None:
    end_with_parent()
    say_where_it_ends()
    rank = int(os.environ["RANK"])
    stage = partial(deadline, f"rank {rank}")
    with stage("init_process_group", START_SECONDS):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        dist.barrier()
    with stage("two layers checked", MAKE_SECONDS):
        check()
    runs: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    floor = 0.0
    for variant in (ONE, TWO):
        if variant == TWO or rank == 0:
            with stage(f"{variant}: model made", MAKE_SECONDS):
                model, inputs = llama("llama-8b", tokens)
                if variant == ONE:
                    decode = what == "decode"
                    floor = floor_us(model, 1, tokens) if decode else model_floor_us(model, tokens, torch.bfloat16)
                else:
                    tensor_parallel(model)
            with stage(f"{variant}: optimized", TUNE_SECONDS), few_configs():
                fast: Any = burnish.optimize(model, cache="readonly")  # few configs are nothing to remember
                runs[variant] = prepared(what, fast, model, inputs)
            notes += [f"{variant}: {line}" for line in described(fast.schedule.served[-1])]
        with stage(f"{variant}: ready on both", MAKE_SECONDS + TUNE_SECONDS):
            dist.barrier()
    us: dict[str, list[list[float]]] = {variant: [] for variant in runs}
    with stage("timed", TIME_SECONDS):
        for _ in range(ROUNDS):
            for variant in (ONE, TWO):
                dist.barrier()
                if variant in runs:
                    us[variant].append(timed(runs[variant], AT_ONCE[what]))
    medians = {variant: statistics.median(itertools.chain(*rounds)) for variant, rounds in us.items()}
    say(f"rank {rank}", f"median us: {medians}")
    kernels = {}
    with stage("kernels counted", TIME_SECONDS):
        for variant in (ONE, TWO):
            dist.barrier()
            if variant in runs:
                kernels[variant] = len(kernels_of(runs[variant]))
    if rank == 0:
        print(json.dumps({"us": us, "kernels": kernels, "floor_us": floor, "notes": notes}), flush=True)
    with stage("destroy_process_group", START_SECONDS):
        dist.destroy_process_group()


@contextmanager
def few_configs() -> Iterator[None]:
    """Within the `with`, no more than FEW configs of each Impl are measured where nothing is remembered."""

    def candidates(op: Op, args: Sequence[Any], able: Sequence[str], *rest: Any) -> dict[str, tuple[str, str | None]]:
        tried: Counter[str] = Counter()
        found = {}
        for name, (impl, config) in candidates_of(op, args, able, *rest).items():
            tried[impl] += 1
            if tried[impl] <= FEW:
                found[name] = impl, config
        return found

    with patch.object(tuning, "candidates_of", candidates):
        yield


def check() -> None:
    """The logits of two layers of the model, by the numerics rule, with sums by NCCL and, where there is any, by shared
    memory; nothing is measured. `optimize` verifies the whole model by itself."""
    options: dict[str, Any] = {"layers": 2, "vocabulary": 1024}
    model, inputs = llama("llama-8b", 16, **options)
    eager = model(**inputs).logits
    true = numerics.oracle(model.double(), **inputs).logits
    reason = set_up_symmetric_memory()
    for impl in ["torch"] if reason else ["torch", "symmetric", "symmetric_rows"]:
        divided, _ = llama("llama-8b", 16, **options)
        with patch.object(Tuner, "FIRST_BUDGET_US", 0.0):
            fast = burnish.optimize(tensor_parallel(divided), cache="off", impls={SUM: impl})
            logits = fast(**inputs).logits
        if wrong := verdicts({TWO: logits}, eager, true)[TWO]:
            raise CheckError(f"on two GPUs, sums by {impl}: {wrong}")


def prepared(what: str, fast: Any, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], object]:
    """What is to be timed, after its first calls."""
    if what == "decode":
        model.config.use_cache = True  # type: ignore[union-attr]
        run: Callable[[], object] = Steps(fast, inputs["input_ids"], reads_prompt=False).step
    else:

        def run() -> object:
            return fast(**inputs)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
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
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # at once: to take leave of a GPU that waits for the other rank would be to wait for it
