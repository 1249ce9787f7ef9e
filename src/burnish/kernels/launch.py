"""How every kernel here is launched: one function, so that launches can be recorded, compiled ahead and counted.

Kernels use programmatic dependent launch (PDL) where the device has it (sm_90 and up): a kernel may start while the one
before it still runs. Each kernel therefore

1. calls `launch_dependents(PDL)`: first, so that the kernel after it can be placed as soon as there is room, or last
   if its programs need all of a multiprocessor,
2. may then read, or prefetch into the L2 cache, what no kernel of this package writes (weights), to hide that latency,
3. calls `wait_for_inputs(PDL)` before it reads anything else *and before it writes anything*. Every kernel does,
   whether it needs to or not: only then does a kernel that has waited know that all kernels before it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

# gdc_wait and gdc_launch_dependents exist from sm_90 on; under `if PDL` nothing else is compiled on older devices.


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel of the stream start, once every program has come here or ended."""
    if PDL:
        tl_cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Waits until all kernels before this one are done and what they wrote is visible."""
    if PDL:
        tl_cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Asks for the lines at `pointers` (128 bytes each) to be brought into the L2 cache, and does not wait for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled with, apart from its inputs: block sizes by name, warps, pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 3, **blocks: int) -> Config:
        return cls(tuple(blocks.items()), num_warps, num_stages)

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def __str__(self) -> str:
        blocks = (f"{name}={size}" for name, size in self.blocks)
        return " ".join([*blocks, f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True)
class Target:
    """What a launch has to know of the device."""

    capability: tuple[int, int]
    num_sms: int

    @property
    def pdl(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def tma(self) -> bool:
        return self.capability >= (9, 0)


@dataclass(frozen=True)
class Launch:
    """One launch, as `recording` sees it. `constants` are the kernel's constexpr arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


INTERPRETED = Target((8, 0), 4)  # the interpreter knows no PDL; TMA descriptors it does know

_recorder: ContextVar[tuple[Callable[[Launch], None], Target | None] | None] = ContextVar("recorder", default=None)


def target_of(tensor: Tensor) -> Target:
    """The device that a launch on `tensor` is for."""
    recorder = _recorder.get()
    if recorder is not None and recorder[1] is not None:
        return recorder[1]
    return _device_target(tensor.device.index or 0) if tensor.is_cuda else INTERPRETED


@cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target((properties.major, properties.minor), properties.multi_processor_count)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    config: Config,
    like: Tensor,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Runs `kernel[grid](*args, **constants)` with the config's blocks, and with PDL where there is such a thing.

    The kernel takes its blocks as constexpr arguments by the config's names, and a constexpr `PDL`.
    `like` is any tensor on the device. `registers` bounds those of a thread.
    """
    target = target_of(like)
    constants |= dict(config.blocks) | {"PDL": target.pdl}
    # Triton 3.10 will stop contracting a * b + c unless told to; the kernels here are written with it.
    options: dict[str, Any] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if target.pdl:
        options["launch_pdl"] = True
    if registers is not None:
        options["maxnreg"] = registers
    recorder = _recorder.get()
    if recorder is not None:
        recorder[0](Launch(kernel, grid, args, constants, options))
    elif like.is_cuda and like.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(like.device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


@contextmanager
def recording(record: Callable[[Launch], None], target: Target | None = None) -> Iterator[None]:
    """Within the `with`, launches are handed to `record` instead of being run: outputs are then uninitialized.

    With `target`, kernels are chosen as for that device, whatever the tensors are on.
    """
    token = _recorder.set((record, target))
    try:
        yield
    finally:
        _recorder.reset(token)
