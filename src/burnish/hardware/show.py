"""A device and a data sheet as tables for people."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from burnish._text import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.hardware.ceilings import Rates
    from burnish.hardware.info import DeviceInfo
    from burnish.targets import Target


def device_view(info: DeviceInfo) -> Group:
    """What the device is, and what it measured beside what its vendor states or by which library."""
    rows = _gpu_rows(info) if info.kind == "cuda" else _cpu_rows(info)
    rows.append(("versions", ", ".join(f"{library} {version}" for library, version in info.versions.items())))
    parts: list[RenderableType] = [Text(info.name, style="bold"), _facts(rows)]
    if info.rates is not None:
        sheet = info.data_sheet
        parts.append(_by_library(info.rates) if sheet is None else _beside_peak(info, info.rates, sheet))
        parts.append(
            _facts([("measured", _date(info.rates.date))] + ([] if sheet is None else [("peak", _lines(sheet.source))]))
        )
    return Group(*parts)


def target_view(target: Target) -> Group:
    """What the vendor states, and what is reached of it."""
    facts = [
        ("compute capability", _capability(target.architecture)),
        ("SMs", f"{target.sms}, up to {target.boost_mhz:,} MHz"),
        ("memory", human_bytes(target.memory_bytes)),
        ("L2 cache", human_bytes(target.l2_bytes)),
        ("shared memory", f"{human_bytes(target.shared_bytes)} per SM"),
    ]
    rates = _numbers("", ">vendor's peak", ">reached", ">share", "")
    measured = set(target.measured_gflops) | ({"memory"} if target.measured_gbs is not None else set())
    for what, share in target.attained.items():
        peak = target.memory_gbs if what == "memory" else target.gflops[what]
        unit = _gbs if what == "memory" else _flops
        rates.add_row(what, unit(peak), unit(peak * share), f"{share:.0%}", "" if what in measured else "assumed")
    notes = _facts([("peak", _lines(target.source)), ("reached", _lines(target.measured_by))])
    return Group(Text(target.name, style="bold"), _facts(facts), rates, notes)


def _cpu_rows(info: DeviceInfo) -> list[tuple[str, str]]:
    caches = ", ".join(f"{level} {human_bytes(size)}" for level, size in info.caches.items())
    return [
        ("CPU", info.architecture),
        ("cores", f"{info.cores} ({info.threads} used by torch)"),
        ("in hardware", ", ".join(info.capabilities)),
        ("memory", human_bytes(info.memory_bytes)),
        ("caches", caches or "unknown"),
    ]


def _gpu_rows(info: DeviceInfo) -> list[tuple[str, str]]:
    clocks = {unit: f", up to {mhz:,} MHz" for unit, mhz in info.clocks_mhz.items()}
    return [
        ("compute capability", _capability(info.architecture)),
        ("SMs", f"{info.cores}{clocks.get('SM', '')}"),
        ("in hardware", ", ".join(info.capabilities)),
        ("memory", human_bytes(info.memory_bytes) + clocks.get("memory", "")),
        ("L2 cache", human_bytes(info.caches["L2"])),
        ("shared memory", f"{human_bytes(info.caches['shared per SM'])} per SM"),
    ]


def _beside_peak(info: DeviceInfo, rates: Rates, sheet: Target) -> Table:
    table = _numbers("", ">measured", ">vendor's peak", ">share")
    shares = {what: f"{share:.0%}" for what, share in info.share_of_peak.items()}
    table.add_row("copy", _gbs(rates.copy_gbs), _gbs(sheet.memory_gbs), shares["memory"])
    for dtype, rate in rates.gflops.items():
        peak = sheet.gflops.get(dtype)
        table.add_row(dtype, _flops(rate), "" if peak is None else _flops(peak), shares.get(dtype, ""))
    return table


def _by_library(rates: Rates) -> Table:
    libraries = list(dict.fromkeys(library for by_library in rates.libraries.values() for library in by_library))
    # Only where there is a choice: one library's rate is what stands in the first column already.
    libraries = libraries if len(libraries) > 1 else []
    table = _numbers("", ">measured", *(f">by {library}" for library in libraries))
    table.add_row("copy", _gbs(rates.copy_gbs))
    for dtype, rate in rates.gflops.items():
        by_library = rates.libraries.get(dtype, {})
        cells = (_flops(by_library[library]) if library in by_library else "" for library in libraries)
        table.add_row(dtype, _flops(rate), *cells)
    return table


def _date(stamp: str) -> str:
    """Of "2026-11-27T02:47:42+00:00": "2026-11-27 02:47 UTC"."""
    return f"{datetime.fromisoformat(stamp).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _capability(architecture: str) -> str:
    """Of "sm_90": "9.0 (sm_90)"."""
    digits = architecture.removeprefix("sm_")
    return f"{digits[:-1]}.{digits[-1]} ({architecture})"


def _gbs(rate: float) -> str:
    return f"{rate:,.1f} GB/s" if rate < 100 else f"{rate:,.0f} GB/s"


def _flops(gflops: float) -> str:
    return f"{gflops:,.0f} GFLOP/s" if gflops < 1_000 else f"{gflops / 1e3:,.{1 if gflops < 1e5 else 0}f} TFLOP/s"


def _lines(documents: str) -> str:
    """One document a line."""
    return documents.replace("; ", "\n")


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(what, Text(value))
    return table


def _numbers(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify)
    return table
