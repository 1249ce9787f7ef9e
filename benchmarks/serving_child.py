"""What the serving group runs in a fresh process: `python -m benchmarks.serving_child WHAT`; prints one line of JSON.

Libraries are imported and CUDA and cuBLAS set up before a clock starts, except for what libraries import late.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import triton  # noqa: F401  (the first kernel would import it)
from torch import nn

from benchmarks.prefill import llama
from benchmarks.runner import verdicts
from burnish import numerics, optimize, tuning_store
from burnish.prepare import GraphEntry
from burnish.runtime.module import OptimizedModule
from burnish.tuning import is_current
from tests.zoo import BIG
from tests.zoo.case import padding_mask, seeded

NEW_SIZES = ((1, 64), (2, 128), (4, 96), (8, 256), (1, 33), (3, 257), (16, 128), (1, 384))
MOST_BATCH, MOST_SEQ = 8, 128
WARM_CALLS, CALLS = 20, 300

Inputs = dict[str, Any]
Result = dict[str, Any]


def main(what: str) -> None:
    torch.set_grad_enabled(False)
    print(json.dumps(MEASURES[what]()))


def optimize_bert(device: str = "cuda", *, table: bool) -> Result:
    """Seconds from the model to the end of its first call: with the table of measured times that ships, or none."""
    model, inputs_of = _bert(device)
    with tempfile.TemporaryDirectory() as empty:
        if table:
            _require_table()
        else:
            tuning_store.TABLES = Path(empty)
        return _time_optimize(model, inputs_of(1, 128), device)


def compile_bert(device: str = "cuda") -> Result:
    """The same by torch.compile."""
    model, inputs_of = _bert(device)
    call = partial(torch.compile(model), **inputs_of(1, 128))
    _set_up(device)
    return {"seconds": _seconds(call, device)}


def optimize_llama(device: str = "cuda") -> Result:
    model, inputs = llama("llama-8b", 512, device)
    _require_table()
    return _time_optimize(model, inputs, device)


def new_sizes(device: str = "cuda") -> Result:
    """By size, the seconds of its first call less those of a later one."""
    model, inputs_of = _bert(device)
    fast = optimize(model, (), inputs_of(1, 128))
    beyond = {}
    for batch, seq in NEW_SIZES:
        call = partial(fast, **inputs_of(batch, seq))
        first, *later = (_seconds(call, device) for _ in range(4))
        beyond[f"{batch} x {seq}"] = first - statistics.median(later)
    return {"seconds": beyond, "warning": _warning(fast)}


def host_time(device: str = "cuda") -> Result:
    """Microseconds of the host, each call on an idle device: until the graph is launched, and in the whole call beyond
    the launch."""
    model, inputs_of = _bert(device)
    inputs = inputs_of(1, 128)
    fast = optimize(model, (), inputs, static_outputs=True)
    captured = _captured(fast)
    graph, launches = captured._graph, []

    class Timed:
        def replay(self) -> None:
            launches.append(time.perf_counter())
            graph.replay()
            launches.append(time.perf_counter())

    captured._graph = Timed()
    us: dict[str, list[float]] = {"until the launch": [], "beyond the launch": []}
    for _ in range(WARM_CALLS + CALLS):
        launches.clear()
        began = time.perf_counter()
        fast(**inputs)
        ended = time.perf_counter()
        _synchronize(device)
        before, after = launches
        us["until the launch"].append((before - began) * 1e6)
        us["beyond the launch"].append((ended - began - (after - before)) * 1e6)
    return {"us": {name: taken[WARM_CALLS:] for name, taken in us.items()}}


def random_sizes(device: str = "cuda", *, count: int = 1000) -> Result:
    """Calls at random sizes, each checked: how many were wrong, and MiB reserved after each call."""
    began = time.perf_counter()
    config = transformers.BertConfig(num_hidden_layers=2)
    model = seeded(transformers.BertModel(config)).to(device, torch.float16)
    exact = copy.deepcopy(model).double()
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)

    def inputs_of(batch: int, seq: int) -> Inputs:
        ids = torch.randint(3, config.vocab_size, (batch, seq), generator=generator)
        return {"input_ids": ids.to(device), "attention_mask": padding_mask(batch, seq).to(device)}

    # The peers' memory is reserved too: now for the largest size, so that what grows later is Burnish's.
    largest = inputs_of(MOST_BATCH, MOST_SEQ)
    model(**largest)
    numerics.oracle(exact, **largest)
    before = torch.cuda.memory_reserved()
    fast = optimize(model, (), inputs_of(4, 64))
    wrong, reserved = [], []
    for _ in range(count):
        batch, seq = draw.randint(1, MOST_BATCH), draw.randint(1, MOST_SEQ)
        inputs = inputs_of(batch, seq)
        output = fast(**inputs)
        reserved.append(torch.cuda.memory_reserved() / 2**20)
        # The peers run before the comparison, over whatever memory the output should not have been left in.
        reason = verdicts({"burnish": output}, model(**inputs), numerics.oracle(exact, **inputs))["burnish"]
        if reason:
            wrong.append(f"{batch} x {seq}: {reason}")
    return {
        "wrong": len(wrong),
        "first_wrong": wrong[0] if wrong else None,
        "before_mib": before / 2**20,
        "reserved_mib": reserved,
        "graphs": len(fast.serving._graphs),  # type: ignore[attr-defined]  # a Resolver is a Serving here
        "seconds": time.perf_counter() - began,
        "warning": _warning(fast),
    }


MEASURES: dict[str, Callable[[], Result]] = {
    "optimize-empty": partial(optimize_bert, table=False),
    "optimize-table": partial(optimize_bert, table=True),
    "compile": compile_bert,
    "llama": optimize_llama,
    "new-sizes": new_sizes,
    "host-time": host_time,
    "random-sizes": random_sizes,
}


def _bert(device: str) -> tuple[nn.Module, Callable[[int, int], Inputs]]:
    """BERT-base in float16, and its inputs for (batch, seq)."""
    case = BIG["bert-base"]
    model = case.build().to(device, torch.float16)
    return model, lambda batch, seq: {k: v.to(device) for k, v in case.inputs(batch, seq, torch.float16).items()}


def _time_optimize(model: nn.Module, inputs: Inputs, device: str) -> Result:
    _set_up(device)
    began = time.perf_counter()
    fast = optimize(model, (), inputs)
    _synchronize(device)
    return {"seconds": time.perf_counter() - began, "warning": _warning(fast)}


def _require_table() -> None:
    """RuntimeError where no times are known yet: with empty caches they could only be the table's."""
    if not any(map(is_current, tuning_store.read_all())):
        raise RuntimeError(
            "no table ships for this device and the kernels as they are; `python -m benchmarks.ship FILE` makes one"
        )


def _set_up(device: str) -> None:
    """What the first operator and the first product of a process cost is no part of optimizing."""
    ones = torch.ones(16, 16, dtype=torch.float16, device=device)
    ones.add_(ones) @ ones
    _synchronize(device)


def _seconds(run: Callable[[], object], device: str) -> float:
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: str) -> None:
    torch.get_device_module(device).synchronize()


def _captured(fast: OptimizedModule) -> Any:
    """The captured call of the only signature so far."""
    (entry,) = fast._entries.values()
    if not isinstance(entry, GraphEntry) or entry._captured._graph is None:
        raise RuntimeError(f"no CUDA graph serves the call: {_warning(fast)}")
    return entry._captured


def _warning(fast: OptimizedModule) -> str | None:
    """Which signatures are not served as they should be, or None: their numbers would tell of something else."""
    served = fast.schedule.served
    why = [f"{one.shapes}: {reason}" for one in served if (reason := one.kept_original or one.not_captured)]
    return f"{len(why)} of {len(served)} signatures, such as {why[0]}" if why else None


if __name__ == "__main__":
    main(*sys.argv[1:])
