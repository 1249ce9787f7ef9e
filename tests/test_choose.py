"""Choosing for a new size as on a GPU: after one run that needs no compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from burnish.capture import capture
from burnish.choose import Seen, _choose_on_cuda
from burnish.op import OPS
from burnish.prepare import Prepared, Preparer
from burnish.runtime.module import Call
from burnish.tuning import Tuner
from tests import zoo


def prepared_bert(tuner: Tuner) -> tuple[Prepared, Call]:
    case = zoo.CASES["bert-sdpa-mask"]
    model, inputs = case.build(), case.inputs(2, 16, torch.float32)
    leaves, spec = pytree.tree_flatten(((), inputs))
    return Preparer(model, tuner).prepare(capture(model, (), inputs)), Call((), inputs, leaves, spec)


def test_what_verification_rejected_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner("off")
    prepared, call = prepared_bert(tuner)
    linear = OPS["linear"]
    rejected = [slot for slot in prepared.executable.slots if slot.op is linear]
    prepared.rejected.update(dict.fromkeys((slot.name for slot in rejected), "wrong on this machine"))
    monkeypatch.setattr(linear, "select", lambda *_: pytest.fail("a rejected Impl ran"))
    chosen = _choose_on_cuda(prepared, call, tuner)
    assert rejected
    assert all(chosen.functions[slot.name] == linear.reference for slot in rejected)


def test_the_run_before_the_choice_asks_cudnn_for_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner("off")
    prepared, call = prepared_bert(tuner)
    attention, allowed = OPS["attention"], []

    def select(*args: Any) -> Any:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention.impls["reference"]

    monkeypatch.setattr(attention, "select", select)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    Seen(prepared, call)
    assert allowed
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
