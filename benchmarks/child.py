"""What the startup group runs in a fresh process: `python -m benchmarks.child WHAT VARIANT`; prints one line of JSON.

Libraries are imported before a clock starts, except for what they import late: that is part of a first call.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(what: str, variant: str) -> None:
    measure = {"import": import_time, "first-call": first_call, "new-shape": new_shape, "peak-memory": peak_memory}[
        what
    ]
    print(json.dumps(measure(variant)))


def import_time(module: str) -> dict[str, float]:
    """What the module's import takes once torch is there."""
    importlib.import_module("torch")
    began = time.perf_counter()
    importlib.import_module(module)
    return {"seconds": time.perf_counter() - began}


def first_call(variant: str) -> dict[str, float]:
    make_fast, model, inputs_of = _prepare(variant)
    inputs = inputs_of(1, 128)
    began = time.perf_counter()
    make_fast(model)(**inputs)
    return {"seconds": time.perf_counter() - began}


def new_shape(variant: str) -> dict[str, float]:
    make_fast, model, inputs_of = _prepare(variant)
    fast = make_fast(model)
    for _ in range(3):
        fast(**inputs_of(1, 128))
    inputs = inputs_of(4, 48)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        fast(**inputs)
        times.append(time.perf_counter() - began)
    return {"seconds": max(1e-6, times[0] - min(times[1:]))}  # less than a microsecond is noise, and no ratio's divisor


def peak_memory(variant: str) -> dict[str, float]:
    """MiB of resident memory at its highest, beyond what the process holds once all code is loaded: in the first call
    (with everything that optimizing does), and in later ones."""
    import torch

    make_fast, model, inputs_of = _prepare(variant)
    model = copy.deepcopy(model)  # weights in memory of their own, not in the mapped file that they were read from
    model_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    tiny = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    make_fast(tiny)(torch.randn(2, 8))  # loads what is only imported when it is needed
    base = _status("VmRSS") - model_bytes / 2**20
    fast, inputs = make_fast(model), inputs_of(8, 128)
    peaks = {}
    for when in ("first call", "later calls"):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size so far
        fast(**inputs)
        peaks[when] = _status("VmHWM") - base
    return peaks


def _prepare(variant: str) -> tuple[Callable[[Any], Any], Any, Callable[[int, int], dict[str, Any]]]:
    """How to make a model fast, the model, and its inputs for (batch, seq)."""
    import torch

    import burnish
    from tests.zoo import BIG

    torch.set_grad_enabled(False)
    case = BIG["minilm"]
    model = case.build()
    model(**case.inputs(1, 8, torch.float32))
    ways: dict[str, Callable[[Any], Any]] = {
        "eager": lambda model: model,
        "burnish": burnish.optimize,
        "torch.compile": torch.compile,
    }
    return ways[variant], model, lambda batch, seq: case.inputs(batch, seq, torch.float32)


def _status(key: str) -> float:
    """A size in /proc/self/status, in MiB."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {key}: this measurement needs Linux")
    return int(match[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
