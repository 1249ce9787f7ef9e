"""What this accelerator or CPU is, and what it measured: copy bandwidth and matrix rate, the ceilings of a floor."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from burnish._files import cache_folder
from burnish.hardware import ceilings, saved
from burnish.hardware.ceilings import Rates
from burnish.hardware.describe import describe
from burnish.hardware.info import DeviceInfo

__all__ = ["DeviceInfo", "Rates", "device", "fingerprint"]

_remembered: dict[str, Rates] = {}  # by fingerprint, in this process


def device(target: str | torch.device | None = None, *, measure: bool = True, refresh: bool = False) -> DeviceInfo:
    """Describe a device: "cpu", "cuda", "cuda:1"; None is CUDA where there is one, else the CPU.

    Copy bandwidth and matrix rate are measured once (one to three seconds) and remembered, in this process and in the
    user's cache folder; `refresh=True` measures again, for when the machine was busy; `measure=False` leaves them out
    and takes milliseconds. ValueError for a target that is not here; `burnish.targets` has data sheets of GPUs that
    are not.
    """
    resolved = _resolve(target)
    info = describe(resolved)
    if not measure:
        return info
    key = info.fingerprint
    path = cache_folder("device", hashlib.sha256(key.encode()).hexdigest()[:16] + ".json")
    rates = None if refresh else _remembered.get(key) or saved.load(path, key)
    if rates is None:
        rates = ceilings.measure(resolved)
        saved.save(path, key, rates)
    _remembered[key] = rates
    return replace(info, rates=rates)


def fingerprint(target: str | torch.device | None = None) -> str:
    """`DeviceInfo.fingerprint` of a device, without measuring anything: a key for caches of timings."""
    return device(target, measure=False).fingerprint


def _resolve(target: str | torch.device | None) -> torch.device:
    count = torch.cuda.device_count()
    here = ["'cpu'"] + (["'cuda'"] if count else []) + [f"'cuda:{i}'" for i in range(count)]
    if target is None:
        target = "cuda" if count else "cpu"
    if not isinstance(target, (str, torch.device)):
        raise TypeError(f"target={target!r} is a {type(target).__name__}; a device name would do: {', '.join(here)}")
    try:
        resolved = torch.device(target)
    except RuntimeError:
        raise ValueError(f"target={target!r} is not the name of a device; these are here: {', '.join(here)}") from None
    if resolved.type == "cpu":
        return torch.device("cpu")
    index = resolved.index if resolved.index is not None else (torch.cuda.current_device() if count else 0)
    if resolved.type != "cuda" or index >= count:
        raise ValueError(f"target={str(target)!r} is not a device that torch sees; these are here: {', '.join(here)}")
    return torch.device("cuda", index)
