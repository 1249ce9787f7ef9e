"""Two processes, over gloo or with a GPU each over NCCL, that run the same checks one after another."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from benchmarks.processes import deadline, end_with_parent, say_where_it_ends

RANKS = 2
Check = Callable[[int, Path], None]
"""What one rank checks; it gets its rank, and a folder that all of them share."""
_IMPORTS_SECONDS = 300.0


def run(module: str, checks: str, folder: Path, backend: str = "gloo", seconds: float = 600.0) -> list[tuple[str, str]]:
    """What was wrong in a module's dictionary of checks: the name of the check, and a rank's traceback.

    A rank ends at the first check that fails, and takes the other one with it, which may wait for it. So does a check
    that takes longer than so many seconds; where each rank hangs is on stderr then, as is how long each check took.
    """
    ended = ""
    try:
        torch.multiprocessing.spawn(_rank, (module, checks, folder, backend, seconds), nprocs=RANKS)
    except (ProcessExitedException, ProcessRaisedException) as error:
        ended = f"{error}; stderr says where each rank was"
    files = [file for rank in range(RANKS) if (file := folder / f"rank{rank}.json").exists()]
    wrong = [tuple(wrong) for file in files for wrong in json.loads(file.read_text())]
    return wrong or ([("a rank", ended)] if ended else [])


def _rank(rank: int, module: str, checks: str, folder: Path, backend: str, seconds: float) -> None:
    end_with_parent()
    say_where_it_ends()
    torch.set_num_threads(1)
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    who = f"rank {rank}"
    with deadline(who, "imports", _IMPORTS_SECONDS):
        found: dict[str, Check] = getattr(importlib.import_module(module), checks)
    with deadline(who, "init_process_group", seconds):
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=2 * seconds if backend == "nccl" else 60),  # tracebacks say more than NCCL
        )
    for name, check in found.items():
        torch.manual_seed(rank)  # what a rank draws by itself, the other does not
        try:
            with deadline(who, name, seconds):
                check(rank, folder)
                dist.barrier()  # of what the other finds wrong, it says so itself
        except Exception:
            _end(folder / f"rank{rank}.json", name, traceback.format_exc())
    with deadline(who, "destroy_process_group", seconds):
        dist.destroy_process_group()


def _end(file: Path, name: str, error: str) -> None:
    """Ends the process at once: to take leave of the other rank, or of a GPU that waits, would be to wait for them."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([(name, error)]))
    part.rename(file)
    print(error, file=sys.stderr, flush=True)
    time.sleep(1)  # the other may be about to find the same
    os._exit(1)
