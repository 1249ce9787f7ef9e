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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
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
        return self.sizes[block]

    def __hash__(self) -> int:  # of a dataclass it would be worked out anew each time, 0.4 us in each launch
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.blocks, self.num_warps, self.num_stages))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The blocks by name; not to be changed."""
        return dict(self.blocks)

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


def cdiv(count: int, size: int) -> int:
    """How many times `size` covers `count`. `triton.cdiv`, also for kernels, takes 2.2 us, this 0.1."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two from `count` on, which is at least 1; as quick."""
    return 1 << (count - 1).bit_length()


@lru_cache(maxsize=1024)
def first_config(configs: Callable[..., Sequence[Config]], *args: Any) -> Config:
    """`configs(*args)[0]`, worked out once (10 to 35 us)."""
    return configs(*args)[0]


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

    The kernel takes its blocks as constexpr arguments by the config's names, and a constexpr `PDL`: after all that are
    in `args`. `like` is any tensor on the device. `registers` bounds those of a thread.
    """
    device = like.get_device()  # -1 is the CPU
    kinds = kinds_of(args)
    if _recorder.get() is not None or kinds is None or (device >= 0 and device != torch.cuda.current_device()):
        _launch(kernel, grid, args, config, like, registers, constants)
        return
    # The kernel by its identity, which is its own while an entry holds it: its hash is one of its source.
    key = (id(kernel), device, config, registers, kinds, *constants, *constants.values())
    known = _compiled.get(key)
    if known is not None:
        _, compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return
    compiled = _launch(kernel, grid, args, config, like, registers, constants)
    if compiled is not None and not any(p.is_constexpr for p in kernel.params[: len(args)]):
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        parameters = list(kernel.signature.parameters.values())[len(args) :]
        _compiled[key] = kernel, compiled, tuple(constants.get(p.name, p.default) for p in parameters)


_MOST_COMPILED = 4096
_compiled: dict[Any, tuple[Any, Any, tuple[Any, ...]]] = {}
"""What has been launched: the kernel, what Triton compiled it to, and the arguments that follow `args`.

Triton finds that anew for each launch: all the Python of one took 16 us (layer norm's backward pass) and 30
(attention's forward pass), and takes 7.5 and 12 (Zen 5, triton 3.9). The interpreter compiles nothing.
"""


def kinds_of(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that Triton compiles a kernel anew for in arguments that are no constants; None if they are of other types.

    Of a tensor that is its dtype and whether it begins at a multiple of 16 bytes, of an integer whether it is 1, a
    multiple of 16, or too long for int32, of a float nothing.
    """
    kinds: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is int:
            kinds.append(arg if arg == 1 or arg.bit_length() > 31 else 2 if arg & 15 else 0)
        elif kind is Tensor or kind is torch.nn.Parameter:
            kinds.append(arg.dtype)
            kinds.append(arg.data_ptr() & 15 == 0)
        elif arg is None or kind is float:
            kinds.append(kind)
        elif kind.__name__ == "TensorDescriptor":  # Triton's, or Gluon's, which has a layout
            kinds.append((kind, arg.base.dtype, *arg.block_shape, getattr(arg, "layout", None)))
        else:
            return None
    return tuple(kinds)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    config: Config,
    like: Tensor,
    registers: int | None,
    constants: dict[str, Any],
) -> Any:
    """`launch` by Triton, which compiles what it has not compiled yet; returns that. Completes `constants`."""
    target = target_of(like)
    constants |= config.sizes | {"PDL": target.pdl}
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
        return recorder[0](Launch(kernel, grid, args, constants, options))
    if like.is_cuda and like.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(like.device):
            return kernel[grid](*args, **constants, **options)
    return kernel[grid](*args, **constants, **options)


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
