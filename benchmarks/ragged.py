"""Group `ragged`: encoders on batches of unequal lengths, padded as a tokenizer pads them, with and without padding.

Lengths are uniform from 16 to 128 tokens of 128. "burnish, padded" and "burnish" are the same model optimized with
padding="keep" and padding="remove", timed in turn in one run. Real tokens are checked against eager by the numerics
rule before anything is timed. On CUDA both also say what their time is made of: the kernels of one call, the host's
part of it, and what runs each Op.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import burnish
from benchmarks.gpu import Variant, kernels_of, model_floor_us, print_choices, print_kernels
from benchmarks.runner import Case, CheckError, Record, Session, verdicts
from burnish import numerics
from burnish.models import MINILM, Wanted, load
from burnish.ragged.tokens import TokenMemory, tokens_of
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
        kernels = _explain(session, model, ready, optimized, inputs) if real.is_cuda else {}
        result = session.time(ready, cold_l2=real.is_cuda)
    session.console.print(result)
    session.console.print(f"  {optimized['burnish'].serving.served[0].padding}", style="dim")  # type: ignore[attr-defined]
    return result.records(name, session.command(name), kernels=kernels)


def _explain(
    session: Session, model: nn.Module, ready: dict[str, Variant], optimized: dict[str, Any], inputs: dict[str, Any]
) -> dict[str, int]:
    """Prints what one call of each optimized variant is made of. Returns how much every variant launches."""
    mask, dtype = inputs["attention_mask"], next(model.parameters()).dtype
    launched = {variant: kernels_of(run) for variant, run in ready.items()}
    for variant, fast in optimized.items():
        served, found = fast.serving.served[0], launched[variant]
        session.console.print(f"{variant}: {len(found)} launches, {sum(k.us for k in found):.1f} us on the device")
        print_kernels(session, found)
        print_choices(session, served)
        graph = "by a CUDA graph" if served.cuda_graph else f"without a graph: {served.not_captured}"
        host, until_done = _host_us(ready[variant])
        session.console.print(
            f"  {graph}; the host is back after {host:.1f} us, the device done after {until_done:.1f}; "
            f"in a row calls take {_in_a_row_us(ready[variant]):.1f}"
        )
    memory = TokenMemory(mask, None)
    back, found_after = _host_us(lambda: tokens_of(mask, memory=memory))
    session.console.print(
        f"  tokens: the host goes on after {back:.1f} us, the device has found them after {found_after:.1f}"
    )
    tokens = {"real tokens": int((mask != 0).sum()), "all places": mask.numel()}
    floors = (f"{n} {what} {model_floor_us(model, n, dtype):.1f} us" for what, n in tokens.items())
    session.console.print(f"  floors of the products: {', '.join(floors)}")
    return {variant: len(kernels) for variant, kernels in launched.items()}


def _host_us(run: Variant, calls: int = 50) -> tuple[float, float]:
    """Medians of calls on an idle device: until the call returned, and until the device was done."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        back = time.perf_counter()
        torch.cuda.synchronize()
        times.append(((back - began) * 1e6, (time.perf_counter() - began) * 1e6))
    host, done = zip(*times, strict=True)
    return statistics.median(host), statistics.median(done)


def _in_a_row_us(run: Variant, calls: int = 50, rounds: int = 7) -> float:
    """Of a call that follows others, as batches do that are served: the host is ahead of the device."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(times)
