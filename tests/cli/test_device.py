"""`burnish device`: this machine, a GPU that torch only seems to have, and data sheets."""

from __future__ import annotations

import pytest

import burnish
from burnish.hardware import Rates
from burnish.op import OPS
from burnish.targets import find_target
from tests.cli.running import fails, run, run_json


def test_this_machine_and_the_impls_that_it_runs() -> None:
    info = burnish.device("cpu", measure=False)
    text = run("device", "cpu", "--no-measure")
    assert info.name in text
    assert "the inputs are on cpu, not on a CUDA device" in text.replace("\n", " ")
    assert all(name in text for name in OPS)
    assert "triton_gemv(" in text
    data = run_json("device", "cpu", "--no-measure")
    assert data["fingerprint"] == info.fingerprint
    assert data["rates"] is None
    impls = {(impl["op"], impl["impl"]): impl for impl in data["impls"]}
    assert len(impls) == sum(len(op.impls) for op in OPS.values())
    assert impls["linear", "torch"] == {
        "op": "linear",
        "impl": "torch",
        "dtypes": ["float32", "bfloat16", "float16"],
        "reasons": [],
    }
    assert impls["linear", "triton"]["reasons"] == ["the inputs are on cpu, not on a CUDA device"]


def test_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(12.0, {"float32": 50.0}, "2026-01-01T00:00:00+00:00", {"float32": {"MKL": 40.0, "oneDNN": 50.0}})
    monkeypatch.setattr("burnish.hardware.ceilings.measure", lambda target: rates)
    monkeypatch.setattr("burnish.hardware._remembered", {})
    rows = [line.split() for line in run("device", "cpu", "--refresh").splitlines()]
    assert ["measured", "2026-01-01", "00:00", "UTC"] in rows
    assert ["float32", "50", "GFLOP/s", "40", "GFLOP/s", "50", "GFLOP/s"] in rows
    assert run_json("device", "cpu")["rates"]["libraries"] == {"float32": {"MKL": 40.0, "oneDNN": 50.0}}


def test_device_that_is_not_here() -> None:
    assert "DEVICE toaster is not the name of a device" in fails("device", "toaster")
    assert "--device toaster is not the name of a device" in fails("ops", "--device", "toaster")


def test_a_data_sheet() -> None:
    text = run("device", "--target", "RTX 4090")
    assert text.startswith("NVIDIA RTX 4090\n")
    assert "1,008 GB/s" in text
    as_lists = {"aliases": ["h200"], "compute_capability": [9, 0]}
    assert run_json("device", "--target", "h200") == find_target("h200").to_dict() | as_lists


def test_a_data_sheet_that_there_is_not() -> None:
    assert "there is no target 'v100'; there are: a100-40gb" in fails("device", "--target", "v100")
    assert "leave out DEVICE" in fails("device", "cpu", "--target", "h200")
