"""One thing timed at several sizes: `Sweep` prints as a table, `burnish.plot` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from burnish._text import human_us, plain
from burnish.bench import Benchmark

if TYPE_CHECKING:
    from rich.console import RenderableType

OURS = "burnish"


@dataclass(frozen=True)
class Sweep:
    """What `burnish.benchmark` measured at several sizes.

    Attributes:
        name: of what was timed. about: what of it is the same at all sizes.
        axis: what the size counts, "tokens".
        results: by size, from the smallest. A variant may be missing at some.
        floors: microseconds that the device needs at the least, by size, where they are known.
        impls: the Impl that runs an Op, by size.
    """

    name: str
    about: str
    axis: str
    results: Mapping[int, Benchmark]
    floors: Mapping[int, float] = field(default_factory=dict)
    impls: Mapping[int, str] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """All variants, in the order in which they were given."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result.timings))

    def medians(self, variant: str) -> dict[int, float]:
        """Microseconds by size, where the variant was timed."""
        return {
            size: result.timings[variant].median_us
            for size, result in self.results.items()
            if variant in result.timings
        }

    def records(self, command: str) -> list[dict[str, Any]]:
        """One JSON-ready dict for each size and variant, with the keys `burnish.bench.RECORD_KEYS`."""
        return [
            {**record, "size": size}
            for size, result in self.results.items()
            for record in result.records(f"{self.name} {size} {self.axis}", command, floor_us=self.floors.get(size))
        ]

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        device = next(iter(self.results.values())).device
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(self.axis, justify="right")
        for name in self.variants:
            table.add_column(name, justify="right")
        if self.floors:
            table.add_column("floor", justify="right")
        against = {size: _against_best(result) for size, result in self.results.items()}
        table.add_column("against the best other", justify="right", min_width=max(map(len, against.values())))
        if self.impls:
            table.add_column("Impl")
        for size in self.results:
            cells = [
                human_us(us) if (us := self.medians(name).get(size)) is not None else "-" for name in self.variants
            ]
            if self.floors:
                cells.append(human_us(self.floors[size]))
            impl = [self.impls[size]] if self.impls else []
            table.add_row(f"{size:,}", *cells, against[size], *impl)
        return Group(Text(f"{device.label}; medians", style="italic"), table)

    def __str__(self) -> str:
        return plain(self)


def _against_best(result: Benchmark) -> str:
    """How many times as fast as the fastest of the others, by medians of rounds' ratios."""
    speedups = dict(result.speedups)
    if OURS not in speedups or len(speedups) < 2:
        return ""
    ours = speedups.pop(OURS)
    best = max(speedups, key=speedups.__getitem__)
    return f"{ours / speedups[best]:.2f}x {best}"
