"""What a device reaches: the bandwidth of a large copy and the rate of large matrix products, measured once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.hardware import cpu


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of one device.

    copy_gbs: GB/s (10^9 bytes) of a copy far larger than the caches, bytes read and bytes written both counted.
    gflops: dtype name -> GFLOP/s of a large square matrix product on `randn` data (2 n^3 operations), by the fastest
    library. date: UTC, ISO 8601, when this was measured.
    libraries: dtype name -> library ("MKL", "oneDNN", "cuBLAS") -> GFLOP/s of that product.
    """

    copy_gbs: float
    gflops: Mapping[str, float]
    date: str
    libraries: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@torch.inference_mode()
def measure(target: torch.device) -> Rates:
    """The rates of this device, in one to three seconds. It should have nothing else to do."""
    libraries = {str(dtype).removeprefix("torch."): _gflops(target, dtype) for dtype in _measured_dtypes(target)}
    return Rates(
        copy_gbs=_copy_gbs(target),
        gflops={dtype: max(by_library.values()) for dtype, by_library in libraries.items()},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        libraries=libraries,
    )


def _measured_dtypes(target: torch.device) -> list[torch.dtype]:
    if target.type == "cuda":
        modern = torch.cuda.get_device_capability(target) >= (8, 0)
        return [torch.float32, torch.float16] + ([torch.bfloat16] if modern else [])
    # Without hardware support a bfloat16 product runs at about 1 GFLOP/s: minutes to measure, and a ceiling of nothing.
    halves = [torch.bfloat16] if cpu.onednn_takes("bf16") else []
    halves += [torch.float16] if cpu.onednn_takes("fp16") else []
    return [torch.float32, *halves]


def _copy_gbs(target: torch.device) -> float:
    size = 2**30 if target.type == "cuda" else 2**27  # several times the largest cache
    source = torch.randn(size // 4, device=target)
    sink = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: sink.copy_(source), target) / 1e9


def _gflops(target: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of a square product by each library that PyTorch has for it here."""
    n = 8192 if target.type == "cuda" else (1536 if cpu.available_cpus() <= 8 else 4096)
    # randn, not zeros or small integers: power limits make a GPU's rate depend on the data.
    left, right = (torch.randn(n, n, device=target).to(dtype) for _ in range(2))
    found: dict[str, float] = {}
    for library, product in _products(target, left, right):
        rate = 2 * n**3 / _best_seconds(product, target) / 1e9
        found[library] = max(rate, found.get(library, 0.0))
    return found


def _products(target: torch.device, left: Tensor, right: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way to multiply the two, with the library behind it."""
    if target.type == "cuda":
        yield "cuBLAS", lambda: left @ right
        return
    # F.linear multiplies float32 by MKL, which on an AMD CPU is about half as fast as oneDNN, and halves by oneDNN.
    if left.dtype == torch.float32:
        yield "MKL" if torch.backends.mkl.is_available() else "BLAS", lambda: F.linear(left, right)
    else:
        yield "oneDNN", lambda: F.linear(left, right)
    if torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        yield "oneDNN", lambda: linear(left, right, None, "none", [], "")


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
