"""`--padding remove` of `burnish optimize` and `burnish bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import fails, run, run_json

PADDED = """
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, mask):
        q = self.first(x).unflatten(-1, (2, 8)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, mask[:, None, None, :])
        return self.last(y.transpose(1, 2).flatten(2))


def encoder():
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[2], [6], [3]])
    return Encoder(), {"x": torch.randn(3, 6, 16), "mask": mask}
"""


@pytest.fixture(autouse=True)
def factory(folder: Path) -> None:
    (folder / "padded_factory.py").write_text(PADDED)


def test_optimize_tells_what_was_left_out() -> None:
    args = ("optimize", "padded_factory:encoder", "--device", "cpu")
    assert "11 of 18 tokens are real" in " ".join(run(*args, "--padding", "remove").split())
    assert "tokens are real" not in run(*args)
    kept = run("optimize", "factory:block", "--device", "cpu", "--padding", "remove")
    assert "padding is kept" in " ".join(kept.split())


def test_bench_takes_it() -> None:
    args = ("--device", "cpu", "--seconds", "0.01", "--padding", "remove")
    data = run_json("bench", "padded_factory:encoder", *args)
    assert [record["variant"] for record in data["records"]] == ["eager", "burnish"]
    assert "--padding: gated_mlp is an Op" in fails("bench", "gated_mlp", *args)


def test_a_wrong_word() -> None:
    assert "'drop' is not one of 'keep', 'remove'" in fails("optimize", "padded_factory:encoder", "--padding", "drop")
