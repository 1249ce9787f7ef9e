"""How much memory a trial needs: on CUDA as its allocator counts, on the CPU what PyTorch's allocator hands out.

The resident size of the process would not do on the CPU: it hardly moves for small models, since the system's allocator
keeps freed pages. What libraries take for themselves, past PyTorch, is in neither count.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


class MemoryAccount:
    """What is allocated from now on. Open one before the model of a trial is made."""

    def __init__(self) -> None:
        self._cpu = _storages()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        self._cuda = {index: torch.cuda.memory_allocated(index) for index in devices}

    def peak(self, module: nn.Module, call: Callable[[], object], where: torch.device) -> int:
        """The highest number of bytes that the trial holds during a call: weights, what an optimizer keeps, gradients,
        activations, temporary results. Run the call before, so that what stays from the first one is there.

        Args:
            where: the device of which the memory counts.
        """
        for parameter in module.parameters():
            parameter.grad = None  # on the CPU only what the call itself allocates is seen to be freed
        if where.type == "cuda":
            torch.cuda.synchronize(where)
            torch.cuda.reset_peak_memory_stats(where)
            call()
            torch.cuda.synchronize(where)
            return torch.cuda.max_memory_allocated(where) - self._cuda.get(where.index or 0, 0)
        gc.collect()
        resident = sum(size for place, size in _storages().items() if self._cpu.get(place) != size)
        return resident + _peak_of_call(call)


def _storages() -> dict[int, int]:
    """Bytes of every storage of the CPU that a tensor of Python's uses, by its address."""
    found: dict[int, int] = {}
    for value in gc.get_objects():
        if type(value) not in (Tensor, nn.Parameter):  # others wrap such ones, or stand for some, as fake tensors do
            continue
        if value.layout is torch.strided and value.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # what vmap and the like pass around has no storage
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        elif value.layout is torch._mkldnn:  # type: ignore[attr-defined]
            found[id(value)] = value.numel() * value.element_size()
    found.pop(0, None)  # of empty tensors
    return found


def _peak_of_call(call: Callable[[], object]) -> int:
    """The most bytes of PyTorch's CPU allocator that the call holds at once, of those that it allocates itself."""
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_stderr(), recorded:
        call()
    recorded_events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [event for event in recorded_events if event.name() == _MEMORY_EVENT]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return int(highest)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler writes two lines to it each time, past Python, unless the environment said otherwise when torch was
    loaded. What the call itself writes is lost this once; it is called many times more."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
