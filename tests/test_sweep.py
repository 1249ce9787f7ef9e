"""A sweep as a table and as records."""

from __future__ import annotations

import re

import pytest

from burnish.bench import RECORD_KEYS, Benchmark, Timing
from burnish.hardware import device
from burnish.sweep import Sweep


def measured(**microseconds: float) -> Benchmark:
    timings = {name: Timing(((us,), (us * 1.1,))) for name, us in microseconds.items()}
    return Benchmark(timings, device("cpu", measure=False), "2026-01-02T03:04:05+00:00")


@pytest.fixture
def sweep() -> Sweep:
    results = {1: measured(eager=100, burnish=50), 1024: measured(eager=4000, burnish=5000, liger=2000)}
    return Sweep("gated_mlp", "float32", "tokens", results, {1: 10.0, 1024: 900.0}, {1: "onednn", 1024: "torch"})


def test_variants_may_be_missing_at_some_sizes(sweep: Sweep) -> None:
    assert sweep.variants == ["eager", "burnish", "liger"]
    assert sweep.medians("liger") == {1024: pytest.approx(2100)}


def test_table(sweep: Sweep) -> None:
    rows = [re.split(r"  +", line.strip()) for line in str(sweep).splitlines() if " us " in line]
    assert rows == [
        ["1", "105 us", "52.5 us", "-", "10 us", "2.00x eager", "onednn"],
        ["1,024", "4.2 ms", "5.25 ms", "2.1 ms", "900 us", "0.40x liger", "torch"],
    ]


def test_records(sweep: Sweep) -> None:
    records = sweep.records("burnish bench gated_mlp")
    assert [(r["case"], r["variant"], r["size"], r["floor_us"]) for r in records] == [
        ("gated_mlp 1 tokens", "eager", 1, 10.0),
        ("gated_mlp 1 tokens", "burnish", 1, 10.0),
        ("gated_mlp 1024 tokens", "eager", 1024, 900.0),
        ("gated_mlp 1024 tokens", "burnish", 1024, 900.0),
        ("gated_mlp 1024 tokens", "liger", 1024, 900.0),
    ]
    assert all(set(RECORD_KEYS) <= set(record) for record in records)
