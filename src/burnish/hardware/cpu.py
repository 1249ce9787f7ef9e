"""What the system and PyTorch tell of this CPU."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import torch


@functools.cache
def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def name() -> str:
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def architecture() -> str:
    """Family and model: the name is not enough, virtual machines on Zen 4 and on Zen 5 both say "AMD EPYC"."""
    known = cpuinfo()
    return f"family {known.get('cpu family', '?')} model {known['model']}" if "model" in known else platform.machine()


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_memory() -> int:
    """Bytes of installed memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def caches() -> dict[str, int]:
    """Bytes of the caches that the first core sees, by level; empty where the system does not tell."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if match:
            found[f"L{level}{suffix}"] = int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
    return found


def capabilities() -> tuple[str, ...]:
    """The instructions that torch uses ("AVX512", "AMX"), then the dtypes that the CPU multiplies in hardware."""
    instructions = [torch.backends.cpu.get_cpu_capability()]
    for label, probe in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(torch.cpu, probe, bool)():
            instructions.append(label)
    dtypes = ["float32"]
    dtypes += ["bfloat16"] if onednn_takes("bf16") else []
    dtypes += ["float16"] if onednn_takes("fp16") else []
    return (*instructions, *dtypes)


def onednn_takes(dtype: str) -> bool:
    """Whether torch's oneDNN runs this dtype ("bf16" or "fp16") on this CPU in hardware."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")())
