"""A graph measured beside the calls that compute the same: its ops never take longer than those."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from burnish.capture import capture
from burnish.report.measure import Measured, measure

X = torch.randn(2, 8)
CAPTURED = capture(nn.Sequential(nn.Linear(8, 8), nn.GELU()), (X,)).captured


def measured(call: Callable[[], object]) -> Measured:
    with torch.no_grad():
        return measure(CAPTURED, {}, [X], call, where=torch.device("cpu"), seconds=0.0)


def test_what_no_op_accounts_for_is_left() -> None:
    found = measured(lambda: time.sleep(0.02))
    assert {node.name for node in found.seen.work} == {"linear", "gelu"}
    assert 0 < sum(found.seen.us.values()) < found.times.end_to_end_us
    assert found.notes == ()


def test_ops_that_took_longer_than_a_call_are_scaled_to_it() -> None:
    found = measured(lambda: None)
    ops_us = sum(found.seen.us.values())
    assert 0 <= found.times.end_to_end_us - ops_us == pytest.approx(0.0, abs=1e-6)
    assert "their times are scaled to the call" in found.notes[0]
