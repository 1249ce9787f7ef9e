"""CUDA graphs are dropped before a process group of NCCL's is shut down.

NCCL destroys a communicator only once every CUDA graph that holds one of its collectives is gone, and waits for that
without an end and without a word (NCCL 2.28: `commDestroySync` in init.cc; PyTorch's issue 115388). So a script that
ends with `torch.distributed.destroy_process_group()` while an optimized model is alive would never end. torch has no
hook there: its ProcessGroup's methods are wrapped, once something was captured while there is a group.
"""

from __future__ import annotations

import atexit
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Droppable(Protocol):
    """What holds a CUDA graph, and captures another where it has none."""

    def drop(self) -> None: ...


_holders: weakref.WeakSet[Any] = weakref.WeakSet()
_wrapped: list[str] = []


def drop_before_shutdown(holder: Droppable) -> None:
    """`holder.drop()` is called before any process group of NCCL's is shut down; nothing where there is no group."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    _holders.add(holder)
    if not _wrapped:
        atexit.register(drop_all)  # a group that nobody shuts down is aborted when the process ends: that waits as well
        for name in ("shutdown", "abort"):
            if hasattr(torch.distributed.ProcessGroup, name):
                _wrapped.append(name)
                _wrap(torch.distributed.ProcessGroup, name)


def _wrap(owner: Any, name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def dropping_graphs(group: Any, *args: Any, **kwargs: Any) -> Any:
        if any(device.type == "cuda" for device in group._device_types):
            drop_all()
        return original(group, *args, **kwargs)

    setattr(owner, name, dropping_graphs)


def drop_all() -> None:
    """Drops every graph; each is captured again when it is wanted next. Waits for nothing: a device may hang."""
    for holder in list(_holders):
        holder.drop()
    gc.collect()  # models that nobody has any more, and their graphs: they refer to themselves
