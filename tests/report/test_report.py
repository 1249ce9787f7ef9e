"""The Report: one story in three forms, a summary, tables and data."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import burnish
from burnish.numerics import Verdict
from burnish.record import NearMiss, StepRecord
from burnish.report import Report
from burnish.served import Served
from burnish.tuning import Choice
from burnish.verify import Verification

MEASURED = Choice("torch", {"torch": 5.0, "reference": 20.0}, {"onednn": ["x is on cuda:0", "weight[0] is odd"]})
HISTORY = [
    StepRecord("capture", nodes_before=40, nodes_after=31, seconds=0.5, notes=["free sizes: x[0], x[1]"]),
    StepRecord(
        "raise",
        {"linear: nn.Linear": 2, "rope": 0},
        [NearMiss("rope", "float32[s33, 8] does not fit", ("add",))],
        31,
        25,
        0.25,
    ),
    StepRecord("fuse", {}, [NearMiss("gated_mlp", "used elsewhere", ("mul", "mul_1", "mul_2"))], 25, 25),
]


def served(
    rows: int = 2, original: float | None = 300.0, optimized: float | None = 100.0, kept: str | None = None
) -> Served:
    choices = {"linear_0": MEASURED, "linear_1": MEASURED, "rope_2": Choice("torch", source="only")}
    shapes: dict[str, tuple[int, ...]] = {"args[0]": (rows, 8), "scale": ()}
    return Served(shapes, choices, original, optimized, kept, seconds=0.75)


def verification(*passed: bool) -> Verification:
    verdicts = [Verdict(ok, 0.25, 0.125, 0.5, None if ok else "off") for ok in passed]
    return Verification(
        [SimpleNamespace(node=SimpleNamespace(name=f"n{i}"), ops=["linear"], verdict=v) for i, v in enumerate(verdicts)]
    )  # type: ignore[misc]


def report_of(
    *signatures: Served, history: list[StepRecord] = HISTORY, verified: tuple[bool, ...] = (True, True)
) -> Report:
    schedule: Any = SimpleNamespace(
        model=nn.Linear(1, 1),
        history=history,
        served=signatures,
        verifications=[verification(*verified)] if verified else [],
        quantizations=[],
        perplexity=None,
    )
    return Report(schedule)


# --- summary ---


@pytest.mark.parametrize(
    ("signatures", "summary"),
    [
        ((), "Linear: nothing has been called yet."),
        ((served(),), "Linear is 3.00x as fast as before: 300 us -> 100 us a call at 2x8, scalar."),
        ((served(kept="no Impl beat the original"),), "Linear runs as it was: no Impl beat the original."),
        ((served(2, None, None, "it branches"),), "Linear runs as it was: it branches."),
        ((served(2, None, None),), "Linear: not timed."),
        (
            (served(2, None, None), served(4, 10.0, 5.0)),
            "Linear is 2.00x as fast as before: 10 us -> 5 us a call at 4x8, scalar.",
        ),
    ],
)
def test_summary(signatures: tuple[Served, ...], summary: str) -> None:
    assert report_of(*signatures, verified=()).summary() == summary


def test_summary_counts_what_was_verified() -> None:
    assert "2 of 3 rewritten values are within" in report_of(served(), verified=(True, False, True)).summary()


# --- tables ---


def test_every_step_choice_and_call_is_shown() -> None:
    text = str(report_of(served(), served(4, None, None, "the outputs differ [x]")))
    rows = [line.split() for line in text.splitlines()]
    for row in (
        ["raise", "2", "x", "linear:", "nn.Linear", "31", "->", "25", "250", "ms"],
        ["capture", "free", "sizes:", "x[0],", "x[1]", "40", "->", "31", "500", "ms"],
        ["fuse", "nothing", "25", "->", "25", "0", "us"],
        ["linear", "2", "torch", "5", "us", "reference:", "20", "us"],
        ["onednn:", "x", "is", "on", "cuda:0;", "weight[0]", "is", "odd"],
        ["rope", "1", "torch", "(only)", "no", "other"],
        ["2x8,", "scalar", "300", "us", "100", "us", "3.00x", "750", "ms"],
        ["4x8,", "scalar", "750", "ms", "the", "outputs", "differ", "[x]"],
        ["raise", "rope:", "add:", "float32[s33,", "8]", "does", "not", "fit"],
        ["fuse", "gated_mlp:", "mul", "and", "2", "more:", "used", "elsewhere"],
    ):
        assert row in rows, f"{' '.join(row)} in\n{text}"
    assert "rope: 0" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_a_reason_is_printed_as_it_is() -> None:
    reason = "size [bold]3[/bold] of [s0, 4] \\[x]"
    assert reason in " ".join(str(report_of(served(kept=reason))).split())


def test_a_terminal_shows_the_same() -> None:
    report = report_of(served())
    console = Console(width=100, file=io.StringIO(), record=True, force_terminal=True)
    console.print(report)
    shown = [line.rstrip() for line in console.export_text().splitlines()]
    assert shown[:-1] == str(report).splitlines(), "and an empty line"


def test_before_any_call_there_is_nothing_to_choose() -> None:
    text = str(report_of(history=[], verified=()))
    assert "nothing has been called yet" in text
    assert "Impls chosen" not in text
    assert "Calls served" not in text
    assert "Almost matched" not in text


# --- data ---


def test_data_survive_json(tmp_path: Path) -> None:
    report = report_of(served(), verified=(True, False))
    path = report.to_json(tmp_path / "report.json")
    data = json.loads(path.read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert (data["schema"], data["model"], data["summary"]) == (4, "Linear", report.summary())
    assert data["explanation"] is None
    assert data["steps"][2]["near_misses"] == [
        {"rewrite": "gated_mlp", "reason": "used elsewhere", "nodes": ["mul", "mul_1", "mul_2"]}
    ]
    assert data["steps"] == json.loads(json.dumps([asdict(record) for record in HISTORY]))
    (signature,) = data["signatures"]
    assert signature["shapes"] == {"args[0]": [2, 8], "scale": []}
    assert signature["choices"]["linear_0"]["times_us"] == MEASURED.times_us
    assert data["verified"] == [
        {"node": f"n{i}", "ops": ["linear"], "ok": ok, "error": 0.25, "eager_error": 0.125, "allowed": 0.5}
        for i, ok in enumerate((True, False))
    ]


# --- of a real model ---


class Half(nn.Module):
    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.linear, self.branches = nn.Linear(8, 8), branches

    def forward(self, x: Tensor) -> Tensor:
        return -x if self.branches and x.sum() > 0 else self.linear(x).relu()


@pytest.mark.usefixtures("untimed")
def test_of_an_optimized_model(tmp_path: Path) -> None:
    fast = burnish.optimize(Half(branches=False).eval(), cache="off")
    assert fast.report().summary() == "Half: nothing has been called yet."
    with torch.no_grad():
        fast(torch.randn(2, 8))
    report = fast.report()
    assert report.summary().startswith("Half is ")
    assert "1 of 1 rewritten values" in report.summary()
    data = json.loads(report.to_json(tmp_path / "r.json").read_text())
    assert [step["name"] for step in data["steps"]] == ["capture", "raise", "fuse", "pack", "verify"]
    assert [unit["ops"] for unit in data["verified"]] == [["linear"]]


def test_of_a_model_that_cannot_be_captured() -> None:
    report = burnish.optimize(Half(branches=True).eval(), (torch.randn(2, 8),), cache="off").report()
    assert report.summary().startswith("Half runs as it was: ")
    assert "test_report.py" in report.summary()
    assert report.to_dict()["steps"] == []
    assert "test_report.py" in "".join(str(report).split())


def test_configs_and_graphs_are_told() -> None:
    times = {"torch": 5.0, "triton BLOCK=64 w4 s3": 2.0, "triton BLOCK=32 w4 s3": 3.0, "triton_tma w8 s3": math.inf}
    entry = served()
    entry.choices = {"linear_0": Choice("triton", times, config="BLOCK=64 w4 s3")}
    entry.cuda_graph = True
    text = " ".join(str(report_of(entry)).split())
    assert "linear 1 triton BLOCK=64 w4 s3 2 us torch: 5 us triton_tma: failed" in text
    assert "CUDA graph" in text
    entry.choices = {"linear_0": Choice("torch", times)}
    entry.cuda_graph, entry.not_captured = False, "the inputs are on cpu, cuda:0"
    text = " ".join(str(report_of(entry)).split())
    assert "triton (best of 2): 2 us" in text
    assert "the inputs are on cpu, cuda:0" in text
