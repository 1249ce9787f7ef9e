"""Numbers in device memory, all 0, that a kernel counts with or exchanges words in, and leaves 0 again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ROOM = 1 << 18
_MOST_SHARED = 1 << 12
_buffers: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, int] = {}  # where the next captured launch's numbers begin, in the buffer of stream -1
_own: ContextVar[Tensor | None] = ContextVar("numbers of the graphs that are captured", default=None)


def counters(like: Tensor, count: int) -> Tensor:
    """`count` int32 zeros on the device of `like`, for a kernel that leaves them zero, from a multiple of 128 bytes on.

    Launches that may run at the same time must not share them. Those of one stream follow each other and do share, and
    so do those of graphs that share their other memory, too (`own_counters`). Any other captured launch runs on
    whatever stream its graph is replayed, so each has its own, and they come round again only after a million bytes.
    """
    device = like.device
    if count > _ROOM:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if not like.is_cuda:
        return _buffer(device, 0)[:count]
    if not torch.cuda.is_current_stream_capturing():
        _buffer(device, -1)
        return _buffer(device, torch.cuda.current_stream(device).cuda_stream)[:count]
    own = _own.get()
    if own is not None and own.device == device:
        return own[:count]
    if count > _MOST_SHARED or (device, -1) not in _buffers:  # the replays set these to zero, which takes time
        return torch.zeros(count, dtype=torch.int32, device=device)
    start = _captured.get(device, 0)
    start = start if start + count <= _ROOM else 0
    _captured[device] = start + -(-count // 32) * 32
    return _buffers[device, -1][start : start + count]


def new_counters(device: torch.device | str) -> Tensor:
    """Numbers for `own_counters`."""
    return torch.zeros(_ROOM, dtype=torch.int32, device=device)


@contextmanager
def own_counters(numbers: Tensor) -> Iterator[None]:
    """Within the `with`, launches that this thread captures count with these."""
    token = _own.set(numbers)
    try:
        yield
    finally:
        _own.reset(token)


def _buffer(device: torch.device, stream: int) -> Tensor:
    if (device, stream) not in _buffers:
        _buffers[device, stream] = new_counters(device)
    return _buffers[device, stream]
