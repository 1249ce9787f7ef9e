"""What would come out otherwise on another rank is decided together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import burnish
from burnish import measure, numerics
from burnish.parallel import tensor_parallel
from tests.parallel.models import IDS, MODELS, Whole, assert_alike
from tests.zoo.case import token_ids


def clocks_that_differ(rank: int, folder: Path) -> None:
    """A rank to whom everything takes another time, at random, chooses what the first chooses, and runs as often."""
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache{rank}")
    timed = measure._timed

    def random_us(function: Callable[..., Any], args: Any) -> float:
        timed(function, args)
        return float(torch.randint(1, 60_000, ()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_timed", random_us)
        fast = burnish.optimize(tensor_parallel(MODELS["llama"]()), (), {"input_ids": IDS})
        with torch.no_grad():
            fast(token_ids(4, 16, 101))
    first, second = fast.schedule.served
    summing = [name for name in first.choices if name.startswith("all_reduce_add_")]
    assert {first.choices[name].source for name in summing} == {"measured"}
    assert {second.choices[name].source for name in summing} == {"nearby"}
    tensors = [p.stride() for p in fast.parameters()]
    said = [str([(s.choices, s.kept_original) for s in fast.schedule.served]), str(tensors)]
    digest = torch.tensor([sum(map(ord, text)) for text in said])
    assert_alike(digest)
    Whole(MODELS["llama"]).check_logits(fast)


def a_check_that_fails_on_one_rank(rank: int, folder: Path) -> None:
    """Fails on both: an Impl's values, and then the outputs as a whole."""
    from burnish import checks

    verify = checks.verify
    wrong = numerics.Verdict(False, 1.0, 0.0, 0.0, "it is wrong here")
    verified: list[int] = []

    def first_unit_is_wrong(*args: Any) -> Any:
        found = verify(*args)
        verified.append(len(found.units))
        if rank == 1 and len(verified) == 1:
            found.units[0].verdict = wrong
        return found

    model = tensor_parallel(MODELS["llama"]())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "verify", first_unit_is_wrong)
        fast = burnish.optimize(model, (), {"input_ids": IDS}, cache="off")
    assert len(verified) == 2, "once more after the repair, on both ranks"
    reasons = [prepared.rejected for prepared in fast.serving._prepared]
    where = "it is wrong here" if rank == 1 else "it is wrong on another rank"
    assert [list(rejected.values()) for rejected in reasons] == [[where]]
    Whole(MODELS["llama"]).check_logits(fast)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checks, "check_outputs", lambda *outputs: wrong)
        fast = burnish.optimize(model, (), {"input_ids": IDS}, cache="off")
    (served,) = fast.schedule.served
    assert where in str(served.kept_original)
    Whole(MODELS["llama"]).check_logits(fast, token_ids(3, 5, 101))
