"""A `DeviceInfo` by itself: floors, shares of what the vendor states, text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from burnish._text import plain
from burnish.hardware import DeviceInfo, Rates

CPU = DeviceInfo(
    name="Test CPU",
    kind="cpu",
    architecture="family 1 model 2",
    cores=4,
    threads=2,
    capabilities=("AVX2", "float32"),
    memory_bytes=8 * 2**30,
    caches={"L2": 2**20},
    versions={"torch": "2.13.0"},
    rates=Rates(
        copy_gbs=30.0,
        gflops={"float32": 200.0, "bfloat16": 400.0},
        date="2026-01-01T00:00:00+00:00",
        libraries={"float32": {"MKL": 150.0, "oneDNN": 200.0}, "bfloat16": {"oneDNN": 400.0}},
    ),
)
GPU = DeviceInfo(
    name="NVIDIA H200",
    kind="cuda",
    architecture="sm_90",
    cores=132,
    threads=0,
    capabilities=("float32", "float16", "bfloat16", "tf32", "fp8"),
    memory_bytes=141 * 2**30,
    caches={"L2": 60 * 2**20, "shared per SM": 228 * 2**10},
    versions={"torch": "2.13.0", "cuda": "13.0"},
    rates=Rates(copy_gbs=4_200.0, gflops={"float32": 50_000.0, "float16": 750_000.0}, date="2026-01-01T00:00:00+00:00"),
    clocks_mhz={"SM": 1980},
)


def test_floor_is_the_larger_of_memory_and_compute() -> None:
    assert CPU.floor_us(flops=200e3, num_bytes=0) == pytest.approx(1.0)
    assert CPU.floor_us(flops=0, num_bytes=30e3) == pytest.approx(1.0)
    assert CPU.floor_us(flops=200e3, num_bytes=90e3) == pytest.approx(3.0)
    assert CPU.floor_us(400e3, 0, torch.bfloat16) == pytest.approx(1.0)
    assert CPU.floor_us(400e3, 0, torch.float16) == pytest.approx(1.0)  # not measured: the highest rate


def test_floor_without_rates_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="without measure=False"):
        replace(CPU, rates=None).floor_us(1, 1)


def test_names() -> None:
    assert CPU.slug == "test-cpu-family-1-model-2-4-cores"
    assert CPU.label == "Test CPU (family 1 model 2), 2 threads"
    assert (GPU.slug, GPU.label) == ("nvidia-h200", "NVIDIA H200")


def test_a_cpu_is_printed_with_every_librarys_rate() -> None:
    lines = str(CPU).splitlines()
    assert lines[0] == "Test CPU"
    for expected in ("8 GiB", "L2 1 MiB", "30.0 GB/s", "torch 2.13.0", "by MKL", "2026-01-01"):
        assert any(expected in line for line in lines)
    assert [line.split() for line in lines if line.startswith((" float32", " bfloat16"))] == [
        ["float32", "200", "GFLOP/s", "150", "GFLOP/s", "200", "GFLOP/s"],
        ["bfloat16", "400", "GFLOP/s", "400", "GFLOP/s"],
    ]
    assert "\x1b" not in str(CPU)


def test_a_gpu_is_printed_beside_what_its_vendor_states() -> None:
    text = str(GPU)
    assert "9.0 (sm_90)" in text
    assert "132, up to 1,980 MHz" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["copy", "4,200", "GB/s", "4,800", "GB/s", "88%"] in rows
    assert ["float32", "50.0", "TFLOP/s", "66.9", "TFLOP/s", "75%"] in rows
    assert ["float16", "750", "TFLOP/s", "989", "TFLOP/s", "76%"] in rows
    assert "https://www.nvidia.com/en-us/data-center/h200/" in text


def test_a_gpu_without_a_data_sheet_is_printed_too() -> None:
    unknown = replace(GPU, name="NVIDIA X1")
    assert unknown.share_of_peak == {}
    assert ["copy", "4,200", "GB/s"] in [line.split() for line in str(unknown).splitlines()]
    assert "vendor" not in str(unknown)


@pytest.mark.parametrize("info", [CPU, GPU], ids=["cpu", "gpu"])
def test_text_fits_80_columns(info: DeviceInfo) -> None:
    assert max(map(len, plain(info, width=80).splitlines())) <= 80


def test_json_is_complete() -> None:
    data = json.loads(json.dumps(GPU.to_dict()))
    assert data["fingerprint"] == GPU.fingerprint
    assert data["rates"]["gflops"]["float16"] == 750_000.0
    assert data["clocks_mhz"] == {"SM": 1980}
    assert data["data_sheet"]["memory_gbs"] == 4_800
    assert data["share_of_peak"] == pytest.approx({"memory": 0.875, "float32": 0.7474, "float16": 0.758}, abs=1e-3)
    data = json.loads(json.dumps(CPU.to_dict()))
    assert (data["data_sheet"], data["share_of_peak"]) == (None, {})
    assert data["rates"]["libraries"]["float32"] == {"MKL": 150.0, "oneDNN": 200.0}
