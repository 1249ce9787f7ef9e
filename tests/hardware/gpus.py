"""A CUDA device that is not there: what torch would say of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 150_109_880_320,
    "L2_cache_size": 60 * 2**20,
    "shared_memory_per_multiprocessor": 228 * 2**10,
    "clock_rate": 1_980_000,
    "memory_clock_rate": 3_201_000,
}


def pretend(monkeypatch: pytest.MonkeyPatch, **properties: Any) -> None:
    """`torch.cuda` has one device with these properties; what is None is not there."""
    given = {name: value for name, value in (H200 | properties).items() if value is not None}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**given))
