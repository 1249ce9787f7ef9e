"""Choosing for a new size as on a GPU: after one run that needs no compiler."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from burnish.capture import capture
from burnish.choose import _choose_on_cuda
from burnish.op import OPS
from burnish.prepare import Preparer
from burnish.runtime.module import Call
from burnish.tuning import Tuner
from tests import zoo


def test_what_verification_rejected_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo.CASES["bert-sdpa-mask"]
    model, inputs, tuner = case.build(), case.inputs(2, 16, torch.float32), Tuner("off")
    leaves, spec = pytree.tree_flatten(((), inputs))
    prepared = Preparer(model, tuner).prepare(capture(model, (), inputs))
    linear = OPS["linear"]
    rejected = [slot for slot in prepared.executable.slots if slot.op is linear]
    prepared.rejected.update(dict.fromkeys((slot.name for slot in rejected), "wrong on this machine"))
    monkeypatch.setattr(linear, "select", lambda *_: pytest.fail("a rejected Impl ran"))
    chosen = _choose_on_cuda(prepared, Call((), inputs, leaves, spec), tuner)
    assert rejected
    assert all(chosen.functions[slot.name] == linear.reference for slot in rejected)
