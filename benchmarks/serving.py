"""Group `serving`: what it costs to start and to serve with Burnish on a GPU: optimizing, a new size, a call's host
time, memory over many sizes.

Everything is measured in fresh processes with cache folders of their own; see serving_child.py for what they do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.runner import Case, CheckError, Record, Session
from benchmarks.startup import cache_environment, now, records_of, run_child, template
from burnish._text import human_us
from burnish.bench import Benchmark, Timing
from burnish.hardware import device

REPEATS = 2
EMPTY = {"burnish": "optimize-empty", "compile-default": "compile"}
SHIPPED = {"burnish": "optimize-table"}


def cases() -> Iterator[Case]:
    for name, variants, repeats in (
        ("bert-base-fp16-b1-s128 optimize, empty cache", EMPTY, REPEATS),
        ("bert-base-fp16-b1-s128 optimize, shipped table", SHIPPED, REPEATS),
        ("llama-8b-prefill-b1-s512 optimize, shipped table", {"burnish": "llama"}, 1),
    ):
        yield Case(name, partial(_optimize, name=name, variants=variants, repeats=repeats))
    for name, run in (
        ("bert-base-fp16 new size, beyond its own run", _new_sizes),
        ("bert-base-fp16-b1-s128 host time of a call", _host_time),
        ("bert-base-fp16 1000 random sizes, memory", _random_sizes),
    ):
        yield Case(name, partial(run, name=name))


def _optimize(session: Session, *, name: str, variants: Mapping[str, str], repeats: int) -> list[Record]:
    """From the model to the end of its first fast call."""
    seconds: dict[str, list[float]] = {variant: [] for variant in variants if session.wants(variant)}
    for _ in range(repeats):
        for variant, times in seconds.items():
            times.append(_child(session, variants[variant])["seconds"])
    return records_of(session, name, seconds)


def _new_sizes(session: Session, *, name: str) -> list[Record]:
    """First calls at sizes not seen before, each less a later call at that size; the spread is that of the sizes."""
    seconds = _child(session, "new-sizes")["seconds"]
    for size, beyond in seconds.items():
        session.console.print(f"  {size}: {human_us(beyond * 1e6)}")
    return records_of(session, name, {"burnish": list(seconds.values())})


def _host_time(session: Session, *, name: str) -> list[Record]:
    """Microseconds of the host in a call; what comes after the launch runs while the device computes."""
    us = _child(session, "host-time")["us"]
    result = Benchmark({part: Timing((tuple(calls),)) for part, calls in us.items()}, device(measure=False), now())
    session.console.print(result)
    return result.records(name, session.command(name))


def _random_sizes(session: Session, *, name: str) -> list[Record]:
    """Memory that torch holds on the device, the model's and its float64 copy's included: it should not grow."""
    found = _child(session, "random-sizes")
    reserved = found["reserved_mib"]
    session.console.print(
        f"  {len(reserved)} calls, {found['wrong']} wrong, {found['graphs']} graphs kept, {found['seconds']:.0f} s; "
        f"{found['before_mib']:.0f} MiB before optimizing"
    )
    if found["wrong"]:
        raise CheckError(f"{found['wrong']} outputs are wrong, the first at {found['first_wrong']}")
    records = []
    for calls in (200, len(reserved)):
        mib = reserved[calls - 1]
        session.console.print(f"  after {calls} sizes: {mib:.0f} MiB")
        records.append({**template(session, name), "variant": f"after {calls} sizes", "reserved_mib": round(mib, 1)})
    return records


def _child(session: Session, what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        result = run_child("benchmarks.serving_child", what, environment=cache_environment(cache))
    if result.get("warning"):
        session.console.print(f"[red]{what}: not served as it should be: {result['warning']}[/red]")
    return result
