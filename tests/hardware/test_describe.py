"""What a device is: this CPU, and GPUs by the properties that torch gives."""

from __future__ import annotations

import pytest
import torch

from burnish.hardware import cpu, device
from tests.hardware.gpus import pretend


def test_describes_this_cpu() -> None:
    info = device("cpu", measure=False)
    assert info.kind == "cpu"
    assert info.name
    assert info.architecture
    assert info.cores >= 1
    assert info.threads == torch.get_num_threads()
    assert "float32" in info.capabilities
    assert info.versions["torch"] == torch.__version__
    assert info.rates is None
    assert info.data_sheet is None
    assert info.clocks_mhz == {}


def test_instructions_are_those_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(cpu, "onednn_takes", lambda dtype: dtype == "bf16")
    assert cpu.capabilities() == ("AVX512", "AVX512-BF16", "AMX", "float32", "bfloat16")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # as in a build of torch that does not tell
    assert "AMX" not in cpu.capabilities()


def test_describes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    info = device("cuda:0", measure=False)
    assert (info.name, info.architecture, info.cores) == ("NVIDIA H200", "sm_90", 132)
    assert info.capabilities == ("float32", "float16", "bfloat16", "tf32", "fp8")
    assert info.memory_bytes == 150_109_880_320
    assert info.caches == {"L2": 60 * 2**20, "shared per SM": 228 * 2**10}
    assert info.clocks_mhz == {"SM": 1980, "memory": 3201}
    assert info.data_sheet is not None
    assert info.data_sheet.name == "NVIDIA H200"


def test_clocks_that_are_not_told_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, clock_rate=None, memory_clock_rate=0)
    info = device("cuda", measure=False)
    assert info.clocks_mhz == {}
    assert "SMs                  132\n" in str(info)


def test_dtypes_of_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, name="Tesla T4", major=7, minor=5)
    assert device(measure=False).capabilities == ("float32", "float16")
