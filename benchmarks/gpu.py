"""What the groups for a GPU share: the peers, captured as CUDA graphs too, kernel counts, and floors."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import burnish
from benchmarks.runner import CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.hardware import device
from burnish.served import Served

Variant = Callable[[], object]
Inputs = Mapping[str, Any]

MOST_FEATURES = 1 << 16  # more are a vocabulary's: logits of the last position only

COMPILED = {"compile-default": None, "compile-max-autotune": "max-autotune-no-cudagraphs"}


def peers(function: Callable[..., object], inputs: Inputs, wanted: Callable[[str], bool]) -> dict[str, Variant]:
    """Eager and torch.compile, each called plainly and replayed as a CUDA graph, as far as they are wanted."""
    found: dict[str, Variant] = {"eager": lambda: function(**inputs)}
    if wanted("eager-graph"):
        found["eager-graph"] = captured(found["eager"])
    for name, mode in COMPILED.items():
        if not wanted(name):
            continue
        torch.compiler.reset()
        fast = torch.compile(function, mode=mode)
        found[name] = _calling(fast, inputs)
        found[f"{name}-graph"] = captured(found[name])
    return found


def _calling(function: Callable[..., object], inputs: Inputs) -> Variant:
    return lambda: function(**inputs)


def captured(run: Variant) -> Variant:
    """`run` as a CUDA graph; its result is where the graph writes it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


@dataclass(frozen=True)
class Kernel:
    """A kernel, memory copy or fill that a call launched, and how long it ran."""

    name: str
    us: float


def kernels_of(run: Variant) -> list[Kernel]:
    """What one call launches on the device, in order."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as trace:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in trace.events() if str(event.device_type) == "DeviceType.CUDA"]
    on_device.sort(key=lambda event: event.time_range.start)
    return [Kernel(event.name, event.time_range.elapsed_us()) for event in on_device]


def print_kernels(session: Session, kernels: list[Kernel]) -> None:
    """How often each kernel ran, and for how long together: the longest first."""
    us: Counter[str] = Counter()
    for kernel in kernels:
        us[kernel.name] += kernel.us  # type: ignore[assignment]  # a Counter adds up floats as well
    times = Counter(kernel.name for kernel in kernels)
    for name, total in us.most_common():
        session.console.print(f"  {times[name]:4} x {total:8.1f} us  {name[:100]}", style="dim")


def print_choices(session: Session, served: Served) -> None:
    """Which Impl runs how many of an Op's calls, and how long it takes by itself."""
    chosen = Counter(
        (slot.rpartition("_")[0], c.candidate, c.times_us.get(c.candidate)) for slot, c in served.choices.items()
    )
    for (op, candidate, us), count in chosen.items():
        session.console.print(f"  {count:4} x {op} by {candidate}" + (f", {us:.1f} us" if us else ""), style="dim")


def model_floor_us(model: nn.Module, tokens: int, dtype: torch.dtype) -> float:
    """The least time for the products of `tokens` rows with the model's weights, or for reading those weights once.

    Attention's own products are left out, so that this stays a lower bound.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    flops = 2 * tokens * sum(w.numel() for w in weights if w.shape[0] < MOST_FEATURES)
    return device().floor_us(flops, sum(weight.nbytes for weight in weights), dtype)


@torch.no_grad()
def run_model(session: Session, name: str, model: nn.Module, inputs: Inputs, *, check: bool = True) -> list[Record]:
    """Times `model(**inputs)` by every variant, after checking Burnish's numbers (against float64, where that fits)."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    dtype = next(p.dtype for p in model.parameters())
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    floor = model_floor_us(model, first.shape[0] * first.shape[1], dtype)
    eager_output = model(**inputs)
    truth = None
    if check:
        truth = numerics.oracle(copy.deepcopy(model).double(), **inputs)
    found = peers(model, inputs, session.wants)
    fast = burnish.optimize(
        copy.deepcopy(model), (), inputs, static_outputs=True
    )  # it packs weights, and the peers' graphs read theirs
    variants: dict[str, Variant] = {"burnish": lambda: fast(**inputs), **found}
    if truth is not None:
        reason = verdicts({"burnish": variants["burnish"]()}, eager_output, truth)["burnish"]
        if reason:
            raise CheckError(f"burnish: {reason}")
    launched = {variant: kernels_of(run) for variant, run in variants.items()}
    kernels = {variant: len(names) for variant, names in launched.items()}
    print_kernels(session, launched["burnish"])
    result = session.time(variants, cold_l2=True)
    session.console.print(result)
    served = fast.schedule.served[0]
    print_choices(session, served)
    if served.not_captured or served.kept_original:
        session.console.print(f"[red]burnish: {served.not_captured or served.kept_original}[/red]")
    records = result.records(name, session.command(name), kernels=kernels, floor_us=floor)
    best = min(r["median_us"] for r in records if r["variant"].startswith("compile")) if len(found) > 2 else None
    mine = records[0]["median_us"]
    if best:
        session.console.print(f"  {name}: burnish {mine:.1f} us, {mine / best:.3f} of the best torch.compile")
    session.console.print(f"  kernels {kernels}, floor {floor:.1f} us, optimize {served.seconds:.1f} s")
    return records
