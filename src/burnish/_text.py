"""Tables for people: one rich table, as colour in a terminal and as plain text everywhere else."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def plain(*renderables: RenderableType, width: int = 120) -> str:
    """The renderables as text without escape codes, at most `width` columns wide, no trailing spaces."""
    from rich.console import Console  # here, not above: rich takes longer to import than the rest of `import burnish`

    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for renderable in renderables:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def human_bytes(count: float) -> str:
    """`count` bytes with a binary unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def human_us(microseconds: float) -> str:
    """A duration in microseconds, in the unit that reads best and three digits: 1234.5 -> '1.23 ms'."""
    for limit, divisor, unit in ((999.5, 1, "us"), (999.5e3, 1e3, "ms")):
        if microseconds < limit:
            return f"{microseconds / divisor:.3g} {unit}"
    return f"{microseconds / 1e6:.3g} s"
