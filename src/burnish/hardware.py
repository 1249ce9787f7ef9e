"""What this accelerator or CPU is, and what it measured: copy bandwidth and matrix rate, the ceilings of a floor."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish._files import cache_folder, write_text
from burnish._text import human_bytes, plain

if TYPE_CHECKING:
    from rich.table import Table

_LIBRARIES = ("torch", "triton", "transformers", "onnxruntime")


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of one device.

    copy_gbs: GB/s (10^9 bytes) of a copy far larger than the caches, bytes read and bytes written both counted.
    gflops: dtype name -> GFLOP/s of a large square matrix product on `randn` data (2 n^3 operations).
    date: UTC, ISO 8601, when this was measured.
    """

    copy_gbs: float
    gflops: Mapping[str, float]
    date: str


@dataclass(frozen=True)
class DeviceInfo:
    """One device: what it is, what it can do, and (unless asked not to) what it measured.

    kind: "cpu" or "cuda". architecture: CPU family and model, or "sm_90". cores: CPUs this process may use, or SMs.
    threads: torch's intra-op threads (CPU), 0 on CUDA. memory_bytes: installed memory. caches: bytes per level.
    """

    name: str
    kind: str
    architecture: str
    cores: int
    threads: int
    capabilities: tuple[str, ...]
    memory_bytes: int
    caches: Mapping[str, int]
    versions: Mapping[str, str]
    rates: Rates | None = None

    @property
    def label(self) -> str:
        """One line for records and headings."""
        if self.kind == "cuda":
            return self.name
        return f"{self.name} ({self.architecture}), {self.threads} thread{'s' if self.threads != 1 else ''}"

    @property
    def slug(self) -> str:
        """A folder name that tells apart machines whose timings differ: 'amd-epyc-family-25-model-17-2-cores'."""
        text = self.name if self.kind == "cuda" else f"{self.name} {self.architecture} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

    @property
    def fingerprint(self) -> str:
        """Device, threads and library versions in one line: timings from equal fingerprints may be reused."""
        versions = [f"torch {self.versions['torch']}"]
        if self.kind == "cuda":
            versions += [f"cuda {self.versions.get('cuda', '?')}", f"triton {self.versions.get('triton', 'none')}"]
        return " | ".join([self.name, self.architecture, f"{self.cores} cores", f"{self.threads} threads", *versions])

    def floor_us(self, flops: float, num_bytes: float, dtype: torch.dtype = torch.float32) -> float:
        """The least time in microseconds that this device needs to move `num_bytes` and to compute `flops`.

        The larger of the two: they can overlap. A dtype that was not measured counts at the highest rate that was,
        so that the result stays a lower bound. ValueError where nothing was measured.
        """
        if self.rates is None:
            raise ValueError("floor_us needs measured rates: call burnish.device() without measure=False")
        gflops = self.rates.gflops.get(str(dtype).removeprefix("torch."), max(self.rates.gflops.values()))
        return max(flops / gflops, num_bytes / self.rates.copy_gbs) / 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return {**asdict(self), "capabilities": list(self.capabilities), "fingerprint": self.fingerprint}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self.name, show_header=False, title_justify="left")
        for row, value in self._rows():
            table.add_row(row, value)
        return table

    def __str__(self) -> str:
        return plain(self)

    def _rows(self) -> list[tuple[str, str]]:
        cores = f"{self.cores} SMs" if self.kind == "cuda" else f"{self.cores} ({self.threads} used by torch)"
        rows = [
            ("kind", f"{self.kind}, {self.architecture}"),
            ("cores", cores),
            ("can do", ", ".join(self.capabilities)),
            ("memory", human_bytes(self.memory_bytes)),
            ("caches", ", ".join(f"{level} {human_bytes(size)}" for level, size in self.caches.items()) or "unknown"),
        ]
        if self.rates is not None:
            rows.append(("copy bandwidth", f"{self.rates.copy_gbs:,.1f} GB/s"))
            rows += [(f"matrix rate {dtype}", f"{rate:,.0f} GFLOP/s") for dtype, rate in self.rates.gflops.items()]
            rows.append(("measured", self.rates.date))
        rows.append(("versions", ", ".join(f"{library} {version}" for library, version in self.versions.items())))
        return rows


def device(target: str | torch.device | None = None, *, measure: bool = True, refresh: bool = False) -> DeviceInfo:
    """Describe a device: "cpu", "cuda", "cuda:1"; None is CUDA where there is one, else the CPU.

    Copy bandwidth and matrix rate are measured once (one to three seconds) and remembered, in this process and in the
    user's cache folder; `refresh=True` measures again, for when the machine was busy; `measure=False` leaves them out
    and takes milliseconds. ValueError for a target that is not here.
    """
    resolved = _resolve(target)
    info = _describe_cuda(resolved) if resolved.type == "cuda" else _describe_cpu()
    if not measure:
        return info
    key = info.fingerprint
    path = cache_folder("device", hashlib.sha256(key.encode()).hexdigest()[:16] + ".json")
    rates = None if refresh else _remembered.get(key) or _load(path, key)
    if rates is None:
        rates = _measure(resolved)
        _save(path, key, rates)
    _remembered[key] = rates
    return replace(info, rates=rates)


def fingerprint(target: str | torch.device | None = None) -> str:
    """`DeviceInfo.fingerprint` of a device, without measuring anything: a key for caches of timings."""
    return device(target, measure=False).fingerprint


_remembered: dict[str, Rates] = {}


def _resolve(target: str | torch.device | None) -> torch.device:
    count = torch.cuda.device_count()
    here = ["'cpu'"] + (["'cuda'"] if count else []) + [f"'cuda:{i}'" for i in range(count)]
    if target is None:
        target = "cuda" if count else "cpu"
    if not isinstance(target, (str, torch.device)):
        raise TypeError(f"target={target!r} is a {type(target).__name__}; a device name would do: {', '.join(here)}")
    try:
        resolved = torch.device(target)
    except RuntimeError:
        raise ValueError(f"target={target!r} is not the name of a device; these are here: {', '.join(here)}") from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    index = resolved.index if resolved.index is not None else (torch.cuda.current_device() if count else 0)
    if resolved.type != "cuda" or index >= count:
        raise ValueError(f"target={str(target)!r} is not a device that torch sees; these are here: {', '.join(here)}")
    return torch.device("cuda", index)


# What the device is ---------------------------------------------------------------------------------------------------


def _describe_cpu() -> DeviceInfo:
    cpuinfo = _read_cpuinfo()
    if "model" in cpuinfo:
        # The model name alone is not enough: virtual machines on Zen 4 and on Zen 5 both call themselves "AMD EPYC".
        architecture = f"family {cpuinfo.get('cpu family', '?')} model {cpuinfo['model']}"
    else:
        architecture = platform.machine()
    return DeviceInfo(
        name=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        kind="cpu",
        architecture=architecture,
        cores=_available_cpus(),
        threads=torch.get_num_threads(),
        capabilities=_cpu_capabilities(),
        memory_bytes=_installed_memory(),
        caches=_cpu_caches(),
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
    )


def _cpu_capabilities() -> tuple[str, ...]:
    """The vector instructions that torch uses, and the dtypes and units beyond float32 that the CPU has in hardware."""
    found = [torch.backends.cpu.get_cpu_capability(), "float32"]
    if _onednn_takes("bf16"):
        found.append("bfloat16")
    if _onednn_takes("fp16"):
        found.append("float16")
    for label, probe in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(torch.cpu, probe, bool)():
            found.append(label)
    return tuple(found)


def _onednn_takes(dtype: str) -> bool:
    """Whether torch's oneDNN runs this dtype ("bf16" or "fp16") on this CPU in hardware."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")())


@functools.cache
def _read_cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_caches() -> dict[str, int]:
    """Bytes of the caches that the first core sees, by level; empty where the system does not tell."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if match:
            caches[f"L{level}{suffix}"] = int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]]
    return caches


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed_memory() -> int:
    """Bytes of installed memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}


# What it measures -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _measure(target: torch.device) -> Rates:
    gflops = {}
    for dtype in _measured_dtypes(target):
        rate = _matrix_gflops(target, dtype)
        gflops[str(dtype).removeprefix("torch.")] = rate
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Rates(copy_gbs=_copy_gbs(target), gflops=gflops, date=now)


def _measured_dtypes(target: torch.device) -> list[torch.dtype]:
    if target.type == "cuda":
        modern = torch.cuda.get_device_capability(target) >= (8, 0)
        return [torch.float32, torch.float16] + ([torch.bfloat16] if modern else [])
    # Without hardware support a bfloat16 product runs at about 1 GFLOP/s: minutes to measure, and a ceiling of nothing.
    return [torch.float32] + ([torch.bfloat16] if _onednn_takes("bf16") else [])


def _copy_gbs(target: torch.device) -> float:
    size = 2**30 if target.type == "cuda" else 2**27  # several times the largest cache
    source = torch.randn(size // 4, device=target)
    sink = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: sink.copy_(source), target) / 1e9


def _matrix_gflops(target: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if target.type == "cuda" else (1536 if _available_cpus() <= 8 else 4096)
    # randn, not zeros or small integers: power limits make a GPU's rate depend on the data.
    left, right = (torch.randn(n, n, device=target).to(dtype) for _ in range(2))
    seconds = _best_seconds(lambda: left @ right, target)
    if target.type == "cpu" and torch.backends.mkldnn.is_available():
        # torch multiplies float32 matrices through MKL, which on an AMD CPU is about half as fast as its own oneDNN.
        linear = torch.ops.mkldnn._linear_pointwise
        seconds = min(seconds, _best_seconds(lambda: linear(left, right, None, "none", [], ""), target))
    return 2 * n**3 / seconds / 1e9


def _best_seconds(function: Callable[[], object], target: torch.device, repeats: int = 7) -> float:
    """The shortest of several runs: a ceiling is what the device can do, not what it does while others use it."""
    times = []
    for _ in range(repeats):
        if target.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(target):
                start.record()
                function()
                end.record()
                end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return min(times[1:])


# What was measured before ---------------------------------------------------------------------------------------------


def _load(path: Path, key: str) -> Rates | None:
    """The rates saved for this fingerprint; None where the file is missing or damaged: then they are measured."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rates = Rates(float(saved["copy_gbs"]), {str(k): float(v) for k, v in saved["gflops"].items()}, saved["date"])
        datetime.fromisoformat(rates.date)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    numbers = [rates.copy_gbs, *rates.gflops.values()]
    sound = saved.get("fingerprint") == key and rates.gflops and all(math.isfinite(x) and x > 0 for x in numbers)
    return rates if sound else None


def _save(path: Path, key: str, rates: Rates) -> None:
    try:
        write_text(path, json.dumps({"fingerprint": key, **asdict(rates)}, indent=2) + "\n")
    except OSError:
        return  # a read-only home: the numbers hold for this process, and the next one measures again
