"""Zeroed counters in device memory, for kernels in which the last program to arrive does what is left."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, int] = {}  # where the next captured launch's counters begin, in the buffer of stream -1
_COUNTERS = 1 << 18
_MAX_TILES = 1 << 12


def counters(like: Tensor, tiles: int) -> Tensor:
    """`tiles` int32 zeros on the device of `like`, for a kernel that leaves them zero.

    Launches that may run at the same time must not share them. Those of one stream follow each other and do share; a
    captured one runs on whatever stream its graph is replayed, so each has its own, and they come round again only
    after a million bytes.
    """
    device = like.device
    if tiles > _MAX_TILES:  # no config that is offered splits so many
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if not like.is_cuda:
        return _buffer(device, 0, _MAX_TILES)[:tiles]
    if not torch.cuda.is_current_stream_capturing():
        _buffer(device, -1, _COUNTERS)
        return _buffer(device, torch.cuda.current_stream(device).cuda_stream, _MAX_TILES)[:tiles]
    if (device, -1) not in _counters:  # memory of the capture would be zeroed by its replays only
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    start = _captured.get(device, 0)
    start = start if start + tiles <= _COUNTERS else 0
    _captured[device] = start + tiles
    return _counters[device, -1][start : start + tiles]


def _buffer(device: torch.device, stream: int, size: int) -> Tensor:
    if (device, stream) not in _counters:
        _counters[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[device, stream]
