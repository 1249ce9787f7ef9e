"""Compiles and loads what a list of calls would launch, several kernels at a time: now, or meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from burnish.kernels.launch import Launch, recording


def warm_up(calls: Iterable[Callable[[], Any]]) -> None:
    """Compiles every kernel that the calls launch, and loads it on the current device; runs none of those. What does
    not compile fails when it is called."""
    wait(compile_meanwhile(launches_of(calls)))


def launches_of(calls: Iterable[Callable[[], Any]]) -> list[Launch]:
    """What the calls would launch, one of each kernel. Stand-ins take the tensors' places: it keeps no memory."""
    launches: dict[Hashable, Launch] = {}

    def record(launch: Launch) -> None:
        launches.setdefault(_key(launch), replace(launch, args=tuple(map(_stand_in, launch.args))))

    with recording(record):
        for call in calls:
            with contextlib.suppress(Exception):  # whoever makes the call hears of it
                call()
    return list(launches.values())


def compile_meanwhile(launches: Sequence[Launch]) -> list[Future[None]]:
    """Begins to compile and load the kernels on the current device; each future ends when its kernel can be run. One
    that is being compiled already is not begun again."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return [_begin((device, *_key(launch)), launch, device) for launch in launches]


_in_progress: dict[Hashable, Future[None]] = {}
_lock = threading.Lock()


def _begin(key: Hashable, launch: Launch, device: int | None) -> Future[None]:
    with _lock:
        if key in _in_progress:
            return _in_progress[key]
        future = _in_progress[key] = _pool().submit(_compile, launch, device)
    future.add_done_callback(lambda _: _in_progress.pop(key, None))
    return future


@cache
def _pool() -> ThreadPoolExecutor:
    # The compiler's passes, ptxas and the C compiler run outside Python's lock.
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="burnish-compile")


def _compile(launch: Launch, device: int | None) -> None:
    if not threading.main_thread().is_alive():  # the process ends, and waits for this thread
        return
    if device is not None:
        torch.cuda.set_device(device)
    with contextlib.suppress(Exception):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **launch.options)
        # What a first launch would do: it compiles a launcher in C (0.25 s) and loads the kernel.
        compiled._init_handles()


def _key(launch: Launch) -> tuple[Hashable, ...]:
    """Equal only for launches of one compiled kernel; unequal keys may still share one, which costs nothing."""
    return launch.kernel, repr([_kind(arg) for arg in launch.args]), repr(launch.constants), repr(launch.options)


def _kind(arg: Any) -> Any:
    """What is compiled for. No entry of a tensor or of what a descriptor describes is read: a GPU's is far."""
    if hasattr(arg, "block_shape"):
        return type(arg), arg.base.dtype, tuple(arg.block_shape), getattr(arg, "layout", None)
    return getattr(arg, "dtype", arg)


def _stand_in(arg: Any) -> Any:
    """What compiles to the same: Triton takes a dtype for an aligned tensor, and of a descriptor reads no base."""
    if isinstance(arg, Tensor) and arg.data_ptr() % 16 == 0:
        return arg.dtype
    if hasattr(arg, "block_shape"):
        return replace(arg, base=torch.empty(0, dtype=arg.base.dtype, device="meta"))
    return arg
