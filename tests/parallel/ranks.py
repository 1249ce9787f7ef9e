"""Two processes over gloo that run the same checks one after another, and what each of them found."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

RANKS = 2
Check = Callable[[int, Path], None]
"""What one rank checks; it gets its rank, and a folder that all of them share."""


def run(module: str, checks: str, folder: Path) -> dict[str, list[str]]:
    """The tracebacks of each check in a dictionary of checks in a module, by name; of a check that was right none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (module, checks, folder, port), nprocs=RANKS)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: [result[name] for result in found if result.get(name, "it was not reached")] for name in found[0]}


def _rank(rank: int, module: str, checks: str, folder: Path, port: int) -> None:
    import importlib

    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results: dict[str, str] = {}
    for name, check in getattr(importlib.import_module(module), checks).items():
        torch.manual_seed(rank)  # what a rank draws by itself, the other does not
        try:
            check(rank, folder)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
        if any_failed(bool(results[name])):  # the ranks may not be in step any more
            break
    dist.destroy_process_group()


def any_failed(failed: bool) -> bool:
    import torch.distributed as dist

    failures = torch.tensor([failed], dtype=torch.int32)
    dist.all_reduce(failures)
    return bool(failures)
