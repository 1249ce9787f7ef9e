"""Rates that were measured before, on disk: one file per fingerprint, checked when it is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from burnish._files import write_text
from burnish.hardware.ceilings import Rates


def load(path: Path, key: str) -> Rates | None:
    """The rates saved for this fingerprint; None, so that they are measured, where the file is missing or damaged."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rates = Rates(
            copy_gbs=float(saved["copy_gbs"]),
            gflops={str(dtype): float(rate) for dtype, rate in saved["gflops"].items()},
            date=saved["date"],
            libraries={
                str(dtype): {str(library): float(rate) for library, rate in by_library.items()}
                for dtype, by_library in saved["libraries"].items()
            },
        )
        datetime.fromisoformat(rates.date)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    by_library = [rate for rates_of_one in rates.libraries.values() for rate in rates_of_one.values()]
    numbers = [rates.copy_gbs, *rates.gflops.values(), *by_library]
    sound = saved.get("fingerprint") == key and rates.gflops and all(math.isfinite(x) and x > 0 for x in numbers)
    return rates if sound else None


def save(path: Path, key: str, rates: Rates) -> None:
    try:
        write_text(path, json.dumps({"fingerprint": key, **asdict(rates)}, indent=2) + "\n")
    except OSError:
        return  # a read-only home: the numbers hold for this process, and the next one measures again
