"""Group `startup`: what Burnish costs before it pays: importing, the first call, a new shape, memory.

Everything is measured in fresh processes with cache folders of their own; see child.py for what they do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.processes import run
from benchmarks.runner import Case, Record, Session
from burnish.bench import Benchmark, Timing
from burnish.hardware import device

REPEATS = 5
ROOT = Path(__file__).parent.parent


def cases() -> Iterator[Case]:
    yield Case("import burnish, after torch", _import)
    yield Case("minilm fp32 b1 s128 first call, empty cache", partial(_first_call, full_cache=False))
    yield Case("minilm fp32 b1 s128 first call, full cache", partial(_first_call, full_cache=True))
    yield Case("minilm fp32 new shape, beyond its own run", _new_shape)
    for when in ("first call", "later calls"):
        yield Case(f"minilm fp32 b8 s128 peak memory, {when}", partial(_peak_memory, when=when))


def _import(session: Session) -> list[Record]:
    seconds = {"burnish": [_child("import", "burnish")["seconds"] for _ in range(REPEATS)]}
    return records_of(session, "import burnish, after torch", seconds)


def _first_call(session: Session, *, full_cache: bool) -> list[Record]:
    """From the model to the end of its first fast call, imports not counted."""
    name = f"minilm fp32 b1 s128 first call, {'full' if full_cache else 'empty'} cache"
    seconds: dict[str, list[float]] = {"burnish": [], "torch.compile": []}
    for _ in range(REPEATS):
        for variant, times in seconds.items():
            with tempfile.TemporaryDirectory() as cache:
                if full_cache:
                    _child("first-call", variant, cache=cache)
                times.append(_child("first-call", variant, cache=cache)["seconds"])
    return records_of(session, name, seconds)


def _new_shape(session: Session) -> list[Record]:
    """The first call at a shape not seen before, less a later call at that shape."""
    seconds: dict[str, list[float]] = {"burnish": [], "torch.compile": []}
    for _ in range(REPEATS):
        for variant, times in seconds.items():
            with tempfile.TemporaryDirectory() as cache:
                times.append(_child("new-shape", variant, cache=cache)["seconds"])
    return records_of(session, "minilm fp32 new shape, beyond its own run", seconds)


def _peak_memory(session: Session, *, when: str) -> list[Record]:
    """The most memory that model, optimizing and running ever held at once, beyond the libraries themselves."""
    name = f"minilm fp32 b8 s128 peak memory, {when}"
    records = []
    for variant in ("eager", "burnish"):
        with tempfile.TemporaryDirectory() as cache:
            mib = _child("peak-memory", variant, cache=cache)[when]
        session.console.print(f"  {variant}: {mib:.0f} MiB")
        records.append({**template(session, name), "variant": variant, "peak_mib": round(mib, 1)})
    return records


def run_child(
    module: str, *arguments: str, environment: Mapping[str, str], shows_progress: bool = False
) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS` prints as its last line; with `shows_progress` its stderr is printed as it
    comes. RuntimeError with the end of its output where it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", module, *arguments]
    done = run(command, {**os.environ, "PYTHONPATH": paths, **environment}, ROOT, shows_progress)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def cache_environment(folder: str) -> dict[str, str]:
    """What makes a process keep Burnish's, Triton's and Inductor's caches in `folder`."""
    inner = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {"XDG_CACHE_HOME": folder, **{name: str(Path(folder, part)) for name, part in inner.items()}}


def _child(what: str, variant: str, cache: str | None = None) -> dict[str, Any]:
    environment = {} if cache is None else cache_environment(cache)
    return run_child("benchmarks.child", what, variant, environment=environment)


def records_of(session: Session, name: str, seconds: dict[str, list[float]]) -> list[Record]:
    """Each process is a round of one call: ratios pair neighbouring processes."""
    timings = {variant: Timing(tuple((s * 1e6,) for s in times)) for variant, times in seconds.items()}
    result = Benchmark(timings, device(measure=False), now())
    session.console.print(result)
    return result.records(name, session.command(name))


def template(session: Session, name: str) -> Record:
    """A record of something that is not a time."""
    (record,) = Benchmark({"": Timing(((0.0,),))}, device(measure=False), now()).records(name, session.command(name))
    return {**record, "median_us": None, "p20_us": None, "p80_us": None}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
