"""Two processes, over gloo or with a GPU each over NCCL, that run the same checks one after another."""

from __future__ import annotations

import importlib
import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from burnish.parallel.group import device_of

RANKS = 2
Check = Callable[[int, Path], None]
"""What one rank checks; it gets its rank, and a folder that all of them share."""


def run(module: str, checks: str, folder: Path, backend: str = "gloo") -> list[tuple[str, str]]:
    """What was wrong in a module's dictionary of checks: the name of the check, and a rank's traceback. After the first
    check that fails there are no others: the ranks may not be in step any more."""
    torch.multiprocessing.spawn(_rank, (module, checks, folder, backend), nprocs=RANKS)
    return [tuple(wrong) for rank in range(RANKS) for wrong in json.loads((folder / f"rank{rank}.json").read_text())]


def _rank(rank: int, module: str, checks: str, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    wrong: list[tuple[str, str]] = []
    for name, check in getattr(importlib.import_module(module), checks).items():
        torch.manual_seed(rank)  # what a rank draws by itself, the other does not
        try:
            check(rank, folder)
        except Exception:
            wrong.append((name, traceback.format_exc()))
        if _any_of_all(bool(wrong)):
            break
    (folder / f"rank{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


def _any_of_all(is_wrong: bool) -> bool:
    bits = torch.tensor([is_wrong], dtype=torch.int32, device=device_of(dist.group.WORLD))  # type: ignore[arg-type]
    dist.all_reduce(bits)
    return bool(bits)
