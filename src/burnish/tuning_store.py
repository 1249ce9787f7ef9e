"""Where measured times are kept: a JSON file for each device and versions, and tables that come with the package.

A table is such a file for a GPU that people have, made by `python -m benchmarks.ship`; it is read by the device's name,
and its entries count for the kernels that they were measured with (their code's hash is part of a family).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TypeAlias

from burnish._files import cache_folder
from burnish.hardware import device, fingerprint

Families: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Microseconds by family, sizes and candidate."""

FORMAT = 1
TABLES = Path(__file__).parent / "tables"


def cache_path() -> Path:
    """The JSON file in which choices for this device and these versions are kept."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in fingerprint())
    return cache_folder() / f"tuning-{safe}.json"


def clear_cache() -> list[Path]:
    """Deletes the remembered choices and Programs of every device and version; returns the files deleted."""
    files = sorted(file for kind in ("tuning", "program") for file in cache_folder().glob(f"{kind}-*.json"))
    for file in files:
        file.unlink()
    return files


def read_all() -> Families:
    """What is known for this device: its table's entries, and over them what was measured here."""
    info = device(measure=False)
    known = _read(TABLES / f"{info.slug}.json", info.name) if info.kind == "cuda" else {}
    _merge(known, _read(cache_path(), info.fingerprint))
    return known


def write(measured: Families) -> bool:
    """Adds to the file what was measured; False where that cannot be written."""
    path = cache_path()
    merged = _read(path, fingerprint())
    _merge(merged, measured)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{time.monotonic_ns()}.tmp")
        scratch.write_text(json.dumps({"format": FORMAT, "device": fingerprint(), "families": merged}, indent=1))
        scratch.replace(path)
    except OSError:
        return False
    return True


def _merge(known: Families, more: Families) -> None:
    for family, entries in more.items():
        known.setdefault(family, {}).update(entries)


def _read(path: Path, of: str) -> Families:
    """The times in a file; anything that is not exactly of this format, or of another device, counts as absent."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("device") != of:
        return {}
    families = data.get("families")
    if not isinstance(families, dict):
        return {}
    return {
        family: {sizes: times for sizes, times in entries.items() if _valid(sizes, times)}
        for family, entries in families.items()
        if isinstance(entries, dict)
    }


def _valid(sizes: Any, times: Any) -> bool:
    return (
        isinstance(sizes, str)
        and all(part.isdigit() for part in sizes.split(",") if part)
        and isinstance(times, dict)
        and bool(times)
        and all(isinstance(us, (int, float)) and us > 0 for us in times.values())
    )
