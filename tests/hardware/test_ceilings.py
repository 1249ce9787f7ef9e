"""What is measured is plausible, and is said of the library that did it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import burnish.hardware
from burnish.hardware import ceilings, device


@pytest.fixture(scope="module")
def rates() -> ceilings.Rates:
    return ceilings.measure(torch.device("cpu"))


def test_measures_plausible_rates(rates: ceilings.Rates) -> None:
    assert 0.5 < rates.copy_gbs < 5_000
    assert 1 < rates.gflops["float32"] < 500_000
    assert ("bfloat16" in rates.gflops) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ("float16" in rates.gflops) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_each_library_is_measured_and_the_fastest_is_the_ceiling(rates: ceilings.Rates) -> None:
    assert set(rates.libraries["float32"]) == {"MKL" if torch.backends.mkl.is_available() else "BLAS", "oneDNN"}
    assert set(rates.libraries) == set(rates.gflops)
    for dtype, by_library in rates.libraries.items():
        assert rates.gflops[dtype] == max(by_library.values())
    assert all(set(rates.libraries[dtype]) == {"oneDNN"} for dtype in set(rates.libraries) - {"float32"})


@pytest.mark.gpu
def test_measures_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.hardware, "cache_folder", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(burnish.hardware, "_remembered", {})
    info = device("cuda")
    assert info.rates is not None
    assert info.architecture.startswith("sm_")
    assert info.rates.copy_gbs > 100
    assert info.rates.gflops["float16"] > info.rates.gflops["float32"] > 1_000
    assert set(info.rates.libraries["float32"]) == {"cuBLAS"}
    assert all(0.2 < share < 1.2 for share in info.share_of_peak.values())
    assert "cuda" in info.versions
