"""The memory of a trial on the CPU, to the byte."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from burnish.scheduling.search.memory import MemoryAccount

CPU = torch.device("cpu")
KIB = 1024


def test_weights_and_the_highest_of_a_call() -> None:
    other = torch.ones(KIB)  # there before: not the trial's
    account = MemoryAccount()
    module = nn.Linear(KIB, KIB, bias=False)

    def call() -> None:
        first = torch.empty(3 * KIB, dtype=torch.uint8)
        del first
        kept = torch.empty(2 * KIB, dtype=torch.uint8)
        assert torch.empty(4 * KIB, dtype=torch.uint8).numel() > kept.numel()

    assert account.peak(module, call, CPU) == 4 * KIB * KIB + 6 * KIB
    del other


def test_gradients_and_what_the_optimizer_keeps() -> None:
    account = MemoryAccount()
    module = nn.Linear(KIB, 8, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, foreach=False)
    x = torch.randn(1, KIB)

    def call() -> None:
        optimizer.zero_grad()
        module(x).sum().backward()
        optimizer.step()

    call()
    weight = 8 * KIB * 4
    peak = account.peak(module, call, CPU)
    assert 3 * weight + x.nbytes <= peak < 4 * weight  # weight, momentum, gradient; the input


def test_a_call_that_raises_and_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("as it is")

    account = MemoryAccount()
    with pytest.raises(KeyError, match="as it is"):
        account.peak(nn.Linear(2, 2), fail, CPU)
    account.peak(nn.Linear(2, 2), lambda: torch.ones(3), CPU)
    print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"
