"""The demo's figures: a real sentence encoder before and after. `burnish demo` shows them; here they are only computed.

all-MiniLM-L6-v2 with its real weights embeds real sentences as it was and optimized; then both are profiled and timed.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import burnish
from burnish import numerics
from burnish.hardware import device
from burnish.models import MINILM, Loaded, Wanted, load, minilm_folder, quiet_transformers
from burnish.record import StepRecord
from burnish.tuning import CacheMode

SENTENCES = (
    "A cat naps on the warm windowsill.",
    "The central bank raised rates again.",
    "How do I reset my password?",
    "She plays violin in an orchestra.",
    "The probe entered orbit around Mars.",
    "Simmer the tomatoes with basil.",
    "Borrowing money will cost more.",
    "On a sunny ledge, a kitten sleeps.",
    "I cannot log in to my account.",
    "A spacecraft reached the red planet.",
    "Let the sauce cook until it thickens.",
    "The goalkeeper saved a penalty.",
)
CASES = ((1, 16), (1, 128), (8, 128))
PROFILED = (1, 128)
_PROFILED_CALLS, _PROFILED_ROUNDS = 4, 5
_TIMED_SECONDS = 1.5

_PARTS = (
    ("attention", r"scaled_dot_product|attention|softmax|flash|fmha|aten::bmm"),
    ("matrix products", r"linear|addmm|aten::mm$|aten::matmul|gemm|nvjet|cutlass"),
    ("norms and residual sums", r"norm|aten::add_?$|CUDAFunctor_?add"),
    ("activations", r"gelu|silu|relu|tanh"),
    ("embeddings", r"embedding|index_select|indexSelect"),
    ("copies", r"aten::copy_|aten::clone|aten::contiguous|aten::cat|copy_kernel|memcpy"),
)
REST = "Python and the rest"


@dataclass(frozen=True)
class Neighbour:
    """The sentence nearest to another one, by its number, and the cosine of their embeddings."""

    index: int
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """How far the embeddings moved: against the original's, and each against the same model in float64."""

    largest_difference: float
    error: float
    original_error: float
    allowed: float
    ok: bool


@dataclass(frozen=True)
class Share:
    """One part's time in one call, in microseconds, before and after."""

    part: str
    before_us: float
    after_us: float


@dataclass(frozen=True)
class Speed:
    """Median time of one call, in microseconds, and the ratio of paired blocks."""

    batch: int
    seq: int
    before_us: float
    after_us: float
    speedup: float


@dataclass(frozen=True)
class Demo:
    """Everything that the demo shows.

    before, after: each sentence's nearest neighbour. impls: how many calls of which Op run by which Impl at
    the sizes of `PROFILED`. kept_original: why the original serves the sentences, where it does. seconds: how long
    optimizing took.
    """

    device: str
    versions: dict[str, str]
    parameters: int
    padded_to: int
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]
    embeddings: Comparison
    steps: list[StepRecord]
    impls: list[tuple[str, str, int]]
    kept_original: str | None
    seconds: float
    shares: tuple[Share, ...]
    speeds: tuple[Speed, ...]
    sentences: tuple[str, ...] = SENTENCES
    profiled: tuple[int, int] = PROFILED

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return {"model": "all-MiniLM-L6-v2", **asdict(self)}


def run(
    target: torch.device, *, cache: CacheMode = "readwrite", on_progress: Callable[[str], None] = lambda doing: None
) -> Demo:
    """Embeds, optimizes, embeds again, profiles and times; `on_progress` is told what is being done.

    ModelError where transformers or the model's package is missing.
    """
    on_progress("loading all-MiniLM-L6-v2")
    loaded = load(MINILM, Wanted(text=SENTENCES, device=target))
    # A copy stays untouched: packing lays weights out anew, and "before" is timed on the layout that PyTorch gave them.
    original = copy.deepcopy(loaded.model)
    before = embed(original, loaded.kwargs)

    on_progress("optimizing: capture, rewrite, measure, verify")
    started = time.perf_counter()
    fast = burnish.optimize(loaded.model, (), loaded.kwargs, cache=cache)
    seconds = time.perf_counter() - started
    after = embed(fast, loaded.kwargs)
    embeddings = compare(original, loaded, before, after)

    inputs = {case: {**loaded.kwargs, **_text_inputs(*case, target)} for case in CASES}
    speeds = []
    for number, case in enumerate(CASES):
        on_progress(f"timing batch {case[0]}, {case[1]} tokens ({number + 1} of {len(CASES)})")
        speeds.append(_time(original, fast, *case, inputs[case]))
    on_progress("profiling")
    shares = _shares(original, fast, inputs[PROFILED])

    report = fast.report()
    here = device(target, measure=False)
    return Demo(
        device=here.label,
        versions=dict(here.versions),
        parameters=sum(p.numel() for p in original.parameters()),
        padded_to=loaded.kwargs["input_ids"].shape[1],
        before=nearest(before),
        after=nearest(after),
        embeddings=embeddings,
        steps=report.history,
        impls=_impls(next(s.choices for s in report.served if PROFILED in s.shapes.values())),
        kept_original=report.served[0].kept_original,
        seconds=seconds,
        shares=shares,
        speeds=tuple(speeds),
        profiled=PROFILED,
    )


def embed(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(sentences, width) unit vectors: the mean of the last hidden states of the real tokens, normalized."""
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def nearest(embeddings: Tensor) -> tuple[Neighbour, ...]:
    """Each row's most similar other row."""
    cosines = embeddings @ embeddings.t()
    cosines.fill_diagonal_(-2.0)
    best = cosines.max(dim=1)
    return tuple(Neighbour(i, c) for i, c in zip(best.indices.tolist(), best.values.tolist(), strict=True))


def compare(original: nn.Module, loaded: Loaded, before: Tensor, after: Tensor) -> Comparison:
    """The rule of `burnish.numerics` on the embeddings."""
    exact = embed(copy.deepcopy(original).double(), loaded.kwargs)
    verdict = numerics.check(after, before, exact)
    return Comparison(
        largest_difference=float((after - before).abs().max()),
        error=float((after - exact).abs().max()),
        original_error=float((before - exact).abs().max()),
        allowed=verdict.allowed,
        ok=verdict.ok,
    )


def _text_inputs(batch: int, seq: int, target: torch.device) -> dict[str, Tensor]:
    """Rows of real text cut to `seq` tokens: no padding, so that no time goes into nothing."""
    once = " ".join(SENTENCES)
    rows = [f"{SENTENCES[row % len(SENTENCES)]} {once * (1 + seq // 64)}" for row in range(batch)]
    with quiet_transformers() as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    return dict(tokenizer(rows, truncation=True, max_length=seq, return_tensors="pt").to(target))


def _time(original: nn.Module, fast: nn.Module, batch: int, seq: int, inputs: dict[str, Any]) -> Speed:
    with torch.inference_mode():
        result = burnish.benchmark({"before": original, "after": fast}, kwargs=inputs, seconds=_TIMED_SECONDS)
    return Speed(
        batch,
        seq,
        result.timings["before"].median_us,
        result.timings["after"].median_us,
        result.speedups["after"],
    )


def _impls(choices: dict[str, Any]) -> list[tuple[str, str, int]]:
    counts = Counter((slot.rpartition("_")[0], choice.impl) for slot, choice in choices.items())
    return [(op, impl, count) for (op, impl), count in counts.items()]


# --- where the time goes ----------------------------------------------------------------------------------------------


def _shares(original: nn.Module, fast: nn.Module, inputs: dict[str, Any]) -> tuple[Share, ...]:
    """Both in turns, each in the round that took it least: what else the machine does disturbs some rounds, not all."""
    rounds = [(profiled(original, inputs), profiled(fast, inputs)) for _ in range(_PROFILED_ROUNDS)]
    before, after = (min(side, key=lambda times: sum(times.values())) for side in zip(*rounds, strict=True))
    return tuple(Share(part, before[part], after[part]) for part in (*(name for name, _ in _PARTS), REST))


def profiled(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """Microseconds of one call by part, under PyTorch's profiler: operators on the CPU, kernels on CUDA.

    What is left of the call's own time is `REST`.
    """
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in inputs.values())
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with torch.inference_mode():
        for _ in range(3):
            model(**inputs)
        with profile(activities=activities, acc_events=True) as recorded:
            started = time.perf_counter()
            for _ in range(_PROFILED_CALLS):
                model(**inputs)
            if on_cuda:
                torch.cuda.synchronize()
            total = (time.perf_counter() - started) * 1e6
    times = dict.fromkeys((name for name, _ in _PARTS), 0.0)
    for event in recorded.events():
        if (event.device_type.name == "CUDA") is not on_cuda:
            continue
        part = part_of(event.name) if on_cuda else _part_with_parents(event)
        if part is not None:
            times[part] += (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / _PROFILED_CALLS
    return {**times, REST: max(total / _PROFILED_CALLS - sum(times.values()), 0.0)}


def part_of(name: str) -> str | None:
    """The part that an operator or kernel belongs to, by its name; None for the rest."""
    return next((part for part, names in _PARTS if re.search(names, name, re.IGNORECASE)), None)


def _part_with_parents(event: Any) -> str | None:
    """The outermost operator decides: a copy inside of a product is part of the product."""
    part = None
    while event is not None:
        part = part_of(event.name) or part
        event = event.cpu_parent
    return part
