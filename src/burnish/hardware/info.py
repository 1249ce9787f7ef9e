"""One device as plain data: what it is, and what it measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from burnish._text import plain
from burnish.hardware.ceilings import Rates
from burnish.targets import Target, target_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class DeviceInfo:
    """One device: what it is, what it can do, and (unless asked not to) what it measured.

    kind: "cpu" or "cuda". architecture: CPU family and model, or "sm_90". cores: CPUs this process may use, or SMs.
    threads: torch's intra-op threads (CPU), 0 on CUDA. capabilities: instructions and dtypes that it has in hardware.
    memory_bytes: installed memory. caches: bytes per level; on CUDA also "shared per SM".
    clocks_mhz: the highest clock of "SM" and "memory" in MHz, on CUDA, where the driver tells.
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
    clocks_mhz: Mapping[str, int] = field(default_factory=dict)

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

    @property
    def data_sheet(self) -> Target | None:
        """What the vendor states of this GPU; None for a CPU, and for a GPU that `burnish.targets` does not have."""
        return target_of(self.name) if self.kind == "cuda" else None

    @property
    def share_of_peak(self) -> dict[str, float]:
        """What was measured over what the vendor states, of "memory" and of each dtype; empty without either."""
        sheet, rates = self.data_sheet, self.rates
        if sheet is None or rates is None:
            return {}
        shares = {"memory": rates.copy_gbs / sheet.memory_gbs}
        return shares | {dtype: r / sheet.gflops[dtype] for dtype, r in rates.gflops.items() if dtype in sheet.gflops}

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
        sheet = self.data_sheet
        return {
            **asdict(self),
            "capabilities": list(self.capabilities),
            "fingerprint": self.fingerprint,
            "data_sheet": None if sheet is None else sheet.to_dict(),
            "share_of_peak": self.share_of_peak,
        }

    def __rich__(self) -> RenderableType:
        from burnish.hardware.show import device_view

        return device_view(self)

    def __str__(self) -> str:
        return plain(self)
