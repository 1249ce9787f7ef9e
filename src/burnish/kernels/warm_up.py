"""Compiles and loads what a list of calls would launch, several kernels at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from burnish.kernels.launch import Launch, recording


def warm_up(calls: Iterable[Callable[[], Any]]) -> None:
    """Compiles every kernel that the calls launch, and loads it on the current device; runs none of those. What does
    not compile fails when it is called."""
    launches: list[Launch] = []
    with recording(launches.append):
        for call in calls:
            with contextlib.suppress(Exception):  # whoever measures the call hears of it
                call()
    distinct = {_key(launch): launch for launch in launches}
    # The compiler's passes, ptxas and the C compiler run outside Python's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), initializer=_use_device, initargs=(_device(),)) as pool:
        list(pool.map(_compile, distinct.values()))


def _device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _compile(launch: Launch) -> None:
    with contextlib.suppress(Exception):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **launch.options)
        # What a first launch would do: it compiles a launcher in C (0.25 s) and loads the kernel.
        compiled._init_handles()


def _key(launch: Launch) -> Any:
    """Equal only for launches of one compiled kernel; unequal keys may still share one, which costs nothing."""
    return launch.kernel, repr([_kind(arg) for arg in launch.args]), repr(launch.constants), repr(launch.options)


def _kind(arg: Any) -> Any:
    """What is compiled for. No entry of a tensor or of what a descriptor describes is read: a GPU's is far."""
    if hasattr(arg, "block_shape"):
        return type(arg), arg.base.dtype, tuple(arg.block_shape), getattr(arg, "layout", None)
    return getattr(arg, "dtype", arg)
