"""An empty folder with a few factories in it, for every test of the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from burnish.checks import Checks
from burnish.tuning import Tuner

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def block(batch=2):
    return Block(), {"x": torch.randn(batch, 5, 16)}


def positional():
    return Block(), (torch.randn(3, 5, 16),)


def alone():
    return Block()


def broken():
    raise RuntimeError("no weights today\\nsecond line")


def number():
    return 3


def bad_inputs():
    return Block(), 3


def unfit():
    return Block(), {"x": torch.randn(2, 5, 17)}


def data_dependent():
    class Loop(Block):
        def forward(self, x):
            return self.norm(x) if x.sum().item() > 1e9 else self.up(x)

    return Loop(), {"x": torch.randn(2, 5, 16)}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with `factory.py` in it, and short measurements that decide nothing."""
    (tmp_path / "factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factory", raising=False)
    monkeypatch.setattr(Tuner, "FIRST_BUDGET_US", 1000.0)
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 2.0, "optimized": 1.0})
    return tmp_path
