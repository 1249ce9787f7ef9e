"""`python -m benchmarks.ship FILE...`: make tuning caches the table that comes with the package for their GPU.

A FILE is the `tuning-....json` that the cache folder holds after benchmark groups ran on the GPU; of several the later
ones count where both know a size. Only what was measured with the kernels as they are now is kept, and of each size the
fastest candidates and the best of each Impl.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

import burnish.ops  # noqa: F401  (is_current asks them)
from burnish.tuning import is_current
from burnish.tuning_store import FORMAT, TABLES, Families

_FASTEST = 6


def table_of(families: Families) -> Families:
    """The entries worth shipping."""
    table: Families = {}
    for family, entries in families.items():
        if is_current(family):
            table[family] = {sizes: _best(times) for sizes, times in entries.items()}
    return table


def _best(times: dict[str, float]) -> dict[str, float]:
    ordered = sorted(times, key=times.__getitem__)
    of_each = {name.split(" ")[0]: name for name in reversed(ordered)}
    kept = {*ordered[:_FASTEST], *of_each.values()}
    return {name: us for name, us in times.items() if name in kept}


def main(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Tuning caches, the oldest first.")],
) -> None:
    """Make tuning caches the table that comes with the package for their GPU."""
    caches = [json.loads(file.read_text()) for file in files]
    name, *others = dict.fromkeys(str(cache["device"]).split(" | ")[0] for cache in caches)
    if others:
        raise SystemExit(f"ship: the files are of {name} and of {', '.join(others)}; a table is for one device")
    families: Families = {}
    for cache in caches:
        for family, entries in cache["families"].items():
            families.setdefault(family, {}).update(entries)
    table = table_of(families)
    target = TABLES / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"format": FORMAT, "device": name, "families": table}, indent=1) + "\n")
    print(f"{sum(map(len, table.values()))} sizes of {len(table)} families in {target}")


if __name__ == "__main__":
    typer.run(main)
