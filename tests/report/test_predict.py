"""The cost model: floors, what bounds an op, and predictions against what was measured on an H200."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import predictions
from burnish.report.costs import Kind, Work
from burnish.report.predict import CostModel


class Device:
    """1 TB/s and 100 TFLOP/s: a microsecond is 1 MB or 100 MFLOP."""

    def floor_us(self, flops: float, num_bytes: float, dtype: torch.dtype = torch.float32) -> float:
        return max(flops / 1e8, num_bytes / 1e6)


CUDA, CPU = CostModel.of(Device(), cuda=True), CostModel.of(Device(), cuda=False)


def work(kind: Kind, flops: float = 0.0, bytes: float = 0.0) -> Work:
    return Work(kind, flops, bytes, 0.0, (), "", torch.float32)


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (work("product", 1e10, 1e6), "compute"),
        (work("product", 1e8, 1e8), "memory"),
        (work("pass", 1e12, 1e7), "memory"),
        (work("product", 1e6, 1e4), "launch"),
        (work("free"), "host"),
    ],
)
def test_bounds(found: Work, bound: str) -> None:
    assert CUDA.bound(found) == bound


def test_a_prediction_is_a_fixed_cost_and_a_share_of_the_ceilings() -> None:
    product = work("product", 1e10, 1e6)
    assert CUDA.floor_us(product) == 100.0
    assert CUDA.predict_us(product) == pytest.approx(3.2 + 100 / 0.8)
    assert CUDA.predict_us(product, kernels=2) == pytest.approx(3.2 + 1.8 + 100 / 0.8)
    assert CUDA.predict_us(product, by_torch=True) > CUDA.predict_us(product)
    assert CUDA.predict_us(work("pass", bytes=1e6)) == pytest.approx(2.0 + 1 / 1.5)
    assert CUDA.predict_us(work("pass", bytes=1e8)) == pytest.approx(2.0 + 100), "more than a cache holds"
    assert CUDA.predict_us(work("free")) == 0.0


def test_what_ops_reach_is_what_a_fusion_of_them_will_reach() -> None:
    product, cached = work("product", 1e10), work("pass", bytes=1e8)
    fitted = CPU.fitted([(product, 3.0 + 100 / 0.9), (cached, 3.0 + 50.0), (work("free"), 40.0)])
    assert fitted.predict_us(product) == pytest.approx(3.0 + 100 / 0.9)
    assert fitted.predict_us(cached) == pytest.approx(3.0 + 50.0)
    assert CPU.fitted([(product, 1000.0)]).predict_us(product) == CPU.predict_us(product), "none gets worse"


# --- against an H200 --------------------------------------------------------------------------------------------------


def test_the_committed_predictions_are_near_what_was_measured() -> None:
    known = predictions.measured()
    committed = json.loads((predictions.FOLDER / "predictions.json").read_text())
    assert set(committed["cases"]) == set(known)
    for case, predicted in committed["cases"].items():
        assert predicted["us"] == pytest.approx(known[case]["median_us"], rel=predictions.NEAR), case


def test_the_committed_predictions_are_those_of_today() -> None:
    committed = json.loads((predictions.FOLDER / "predictions.json").read_text())["cases"]
    name, model, inputs = next(each for each in predictions.models() if each[0].startswith("notebook-block"))
    assert predictions.predict(model, inputs) == committed[name], "run: python -m benchmarks.predictions"


@pytest.mark.slow
def test_all_committed_predictions_are_those_of_today() -> None:
    committed = json.loads((predictions.FOLDER / "predictions.json").read_text())["cases"]
    assert {name: predictions.predict(model, inputs) for name, model, inputs in predictions.models()} == committed
