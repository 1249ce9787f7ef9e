"""How long an op would take: a cost model for floors, for what bounds an op, and for fusions that are not made yet.

    time = fixed cost of its kernels + the larger of
           FLOPs / (the device's matrix rate x an efficiency) and bytes / (its bandwidth x an efficiency)

The constants for GPUs are fitted to whole models that were measured on an H200 as CUDA graphs; docs/explain.md holds
the predictions against the measurements. On a CPU, where libraries and caches decide, the efficiencies are those that
the model's own ops reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from burnish.report.costs import Kind, Work
from burnish.report.data import Bound


class Ceilings(Protocol):
    """A `DeviceInfo` or a `Target`."""

    def floor_us(self, flops: float, num_bytes: float, dtype: torch.dtype = torch.float32) -> float: ...


@dataclass(frozen=True)
class Kernels:
    """Kernels for one kind of work: what one costs whatever it does, and the shares of the matrix rate and of the
    bandwidth that it reaches besides. More than 1.0 of the bandwidth is reached where the data are in a cache."""

    fixed_us: float
    compute: float
    memory: float


_CUDA: Mapping[Kind, Kernels] = {
    "product": Kernels(3.2, compute=0.8, memory=1.0),
    "attention": Kernels(2.5, compute=0.5, memory=0.8),
    "biased attention": Kernels(2.5, compute=0.35, memory=0.8),
    "pass": Kernels(2.0, compute=1.0, memory=1.5),
}
# At the least: of products there is a choice of libraries, and PyTorch's attention reaches so much of a product's rate.
_CPU: Mapping[Kind, Kernels] = {
    "product": Kernels(3.0, compute=0.75, memory=1.0),
    "attention": Kernels(3.0, compute=0.45, memory=0.5),
    "biased attention": Kernels(3.0, compute=0.45, memory=0.5),
    "pass": Kernels(3.0, compute=1.0, memory=0.5),
}
_CACHED_BYTES = 25e6  # half of the H200's L2 cache: a pass over more comes from memory,
_UNCACHED, _UNCACHED_BY_TORCH = 1.0, 0.6  # of which it reaches so much; PyTorch's own are often several


@dataclass(frozen=True)
class CostModel:
    """The cost model of one device.

    torch_us: what a kernel of PyTorch has on top, because it cannot begin before the one ahead of it has ended.
    second_us: what each further kernel of an Op adds. call_us: what a call takes besides its kernels.
    """

    device: Ceilings
    cuda: bool
    kernels: Mapping[Kind, Kernels]
    torch_us: float = 0.0
    second_us: float = 0.0
    call_us: float = 0.0

    @classmethod
    def of(cls, device: Ceilings, *, cuda: bool) -> CostModel:
        if cuda:
            return cls(device, True, _CUDA, torch_us=1.5, second_us=1.8, call_us=5.0)
        return cls(device, False, _CPU)

    def fitted(self, measured: Iterable[tuple[Work, float]]) -> CostModel:
        """The same with the efficiencies that these ops reach: (work, microseconds). None gets worse: what PyTorch's
        kernels leave, another Impl may reach."""
        sums: dict[tuple[Kind, bool], tuple[float, float]] = {}
        for work, us in measured:
            fixed = self._fixed_us(work)
            if work.kind == "free" or us < 2 * fixed:  # too short to tell
                continue
            compute, memory = self._floors(work)
            key = work.kind, compute > memory
            floor, total = sums.get(key, (0.0, 0.0))
            sums[key] = floor + max(compute, memory), total + us - fixed
        reached = {key: floor / total for key, (floor, total) in sums.items()}
        kernels = {
            kind: replace(
                assumed,
                compute=max(assumed.compute, reached.get((kind, True), 0.0)),
                memory=max(assumed.memory, reached.get((kind, False), 0.0)),
            )
            for kind, assumed in self.kernels.items()
        }
        return replace(self, kernels=kernels)

    def floor_us(self, work: Work) -> float:
        """The least that the device needs."""
        return max(self._floors(work))

    def predict_us(self, work: Work, *, kernels: int = 1, by_torch: bool = False) -> float:
        """What an op takes that runs as so many kernels, PyTorch's own or an Op's."""
        if work.kind == "free":
            return 0.0
        compute, memory = self._floors(work)
        ours = self.kernels[work.kind]
        reached = ours.memory
        if self.cuda and work.kind == "pass" and work.bytes > _CACHED_BYTES:
            reached = _UNCACHED_BY_TORCH if by_torch else _UNCACHED
        fixed = ours.fixed_us + (kernels - 1) * self.second_us + (self.torch_us if by_torch else 0.0)
        return fixed + max(compute / ours.compute, memory / reached)

    def bound(self, work: Work) -> Bound:
        """What keeps an op from being faster once the host has asked for it.

        host: there is nothing to do on the device (a view). launch: the floor is less than a kernel's fixed cost. Else
        memory or compute, the larger part of the floor.
        """
        if work.kind == "free":
            return "host"
        compute, memory = self._floors(work)
        if max(compute, memory) < self._fixed_us(work):
            return "launch"
        return "compute" if compute > memory else "memory"

    def graph_us(self, kernels_by_torch: int) -> float:
        """What a call takes besides its ops where one CUDA graph launches all of it, so many kernels of PyTorch's too.
        What an Op's own kernels wait for each other is in what they take."""
        return self.call_us + kernels_by_torch * self.torch_us

    @property
    def bandwidth_gbs(self) -> float:
        """The ceiling of memory, GB/s."""
        return 1e6 / self.device.floor_us(0, 1e9)

    def gflops(self, dtype: torch.dtype) -> float:
        """The ceiling of matrix products in `dtype`, GFLOP/s."""
        return 1e6 / self.device.floor_us(1e9, 0, dtype)

    def _fixed_us(self, work: Work) -> float:
        return 0.0 if work.kind == "free" else self.kernels[work.kind].fixed_us

    def _floors(self, work: Work) -> tuple[float, float]:
        """Of arithmetic and of memory. A pass has no use for the matrix units that the rate is of."""
        compute = 0.0 if work.kind in ("pass", "free") else self.device.floor_us(work.flops, 0, work.dtype)
        return compute, self.device.floor_us(0, work.bytes, work.dtype)
