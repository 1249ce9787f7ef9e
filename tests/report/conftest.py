"""Ceilings that no test has to measure, and small models explained once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import burnish
from burnish.hardware import DeviceInfo, Rates
from burnish.report import after, explain
from burnish.report.data import Explanation
from tests import zoo

SECONDS = 0.01  # of measuring: what is looked at is not how long things take


@pytest.fixture(scope="session", autouse=True)
def ceilings() -> Iterator[DeviceInfo]:
    """A CPU that copies 10 GB/s and multiplies at 100 GFLOP/s."""
    here = replace(burnish.device("cpu", measure=False), rates=Rates(10.0, {"float32": 100.0}, "2026-01-01T00:00:00"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (explain, after):
            patch.setattr(module, "device", lambda where: here)
        yield here


def explained(name: str) -> Explanation:
    """A model of the zoo, explained."""
    case = zoo.CASES[name]
    found = burnish.explain(case.build(), (), case.inputs(2, 16, torch.float32), seconds=SECONDS).explanation
    assert found is not None
    return found


@pytest.fixture(scope="session")
def bert() -> Explanation:
    return explained("bert-sdpa-mask")


@pytest.fixture(scope="session")
def gpt2() -> Explanation:
    return explained("gpt2-sdpa")


@pytest.fixture(scope="session")
def llama() -> Explanation:
    return explained("llama-sdpa")


@pytest.fixture(scope="session")
def block() -> Explanation:
    """The notebook's decoder block, which has no layers in it."""
    return explained("notebook-block-post")
