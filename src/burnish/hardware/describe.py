"""This machine's CPU and its CUDA devices as `DeviceInfo`, nothing measured."""

from __future__ import annotations

import functools
import platform
from importlib import metadata
from typing import Any

import torch

from burnish.hardware import cpu
from burnish.hardware.info import DeviceInfo

_LIBRARIES = ("torch", "triton", "transformers", "onnxruntime")


def describe(target: torch.device) -> DeviceInfo:
    """What a CPU or CUDA device is."""
    return _describe_cuda(target) if target.type == "cuda" else _describe_cpu()


def _describe_cpu() -> DeviceInfo:
    return DeviceInfo(
        name=cpu.name(),
        kind="cpu",
        architecture=cpu.architecture(),
        cores=cpu.available_cpus(),
        threads=torch.get_num_threads(),
        capabilities=cpu.capabilities(),
        memory_bytes=cpu.installed_memory(),
        caches=cpu.caches(),
        versions=_versions(),
    )


def _describe_cuda(target: torch.device) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(target)
    capability = properties.major * 10 + properties.minor
    capabilities = ["float32", "float16"]
    capabilities += ["bfloat16", "tf32"] if capability >= 80 else []
    capabilities += ["fp8"] if capability >= 89 else []
    return DeviceInfo(
        name=properties.name,
        kind="cuda",
        architecture=f"sm_{capability}",
        cores=properties.multi_processor_count,
        threads=0,
        capabilities=tuple(capabilities),
        memory_bytes=properties.total_memory,
        caches={"L2": properties.L2_cache_size, "shared per SM": properties.shared_memory_per_multiprocessor},
        versions=_versions() | {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())},
        clocks_mhz=_clocks(properties),
    )


def _clocks(properties: Any) -> dict[str, int]:
    """The highest clocks in MHz, those that this build of torch and the driver tell (in kHz, 0 where unknown)."""
    kilohertz = {"SM": getattr(properties, "clock_rate", 0), "memory": getattr(properties, "memory_clock_rate", 0)}
    return {unit: round(clock / 1000) for unit, clock in kilohertz.items() if clock}


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}
