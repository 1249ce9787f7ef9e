"""`Trial`: one choice, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from burnish._text import human_bytes, human_us
from burnish.scheduling.search.space import Choice, is_value


@dataclass(frozen=True)
class Trial:
    """One choice, measured, or why it could not be.

    Attributes:
        choice: one value for each name.
        work: how much one call does: samples, tokens, ...
        seconds: of one call; None where it did not work. For the baseline a median, for others the baseline's over how
            much faster they were in turn with it: so those can be compared that met the machine in different states.
        memory: bytes that it needs at its peak.
        is_baseline: whether this is the trial that the others were measured beside.
        in_turn: False where the baseline did not fit into memory beside it, so that it was measured alone.
        failure: why it did not work, in one line; empty where it did.
        out_of_memory: whether that was why.
        skipped: it was not run, since one that needs no more memory had too much.
        device: on which it ran.
    """

    choice: Choice
    work: float = 1.0
    seconds: float | None = None
    memory: int | None = None
    is_baseline: bool = False
    in_turn: bool = True
    failure: str = ""
    out_of_memory: bool = False
    skipped: bool = False
    device: str = ""

    @property
    def worked(self) -> bool:
        return self.seconds is not None

    @property
    def throughput(self) -> float:
        """Work a second; 0 where it did not work."""
        return 0.0 if self.seconds is None else self.work / self.seconds

    def fits(self, memory_limit: float | None) -> bool:
        """Whether it did not run out of memory and is within the limit. One that failed otherwise fits."""
        over = memory_limit is not None and self.memory is not None and self.memory > memory_limit
        return not self.out_of_memory and not over

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in self.choice.items())
        if self.seconds is None or self.memory is None:
            return f"{chosen}: {self.failure}"
        return f"{chosen}: {human_us(self.seconds * 1e6)}, {rate(self.throughput)}/s, {human_bytes(self.memory)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Trial:
        """What `to_dict` gave. ValueError for anything else: a file may have been edited."""
        if not isinstance(data, dict) or data.keys() != {f.name for f in fields(cls)}:
            raise ValueError("a trial has other keys")
        choice = data["choice"]
        if not isinstance(choice, dict) or not all(map(is_value, choice.values())):
            raise ValueError("a trial's choice is no dict of values")
        seconds, memory = data["seconds"], data["memory"]
        measured = _positive(seconds) and type(memory) is int and memory >= 0
        texts, flags = ("failure", "device"), ("is_baseline", "in_turn", "out_of_memory", "skipped")
        ok = (
            _positive(data["work"])
            and (seconds is memory is None if data["failure"] else measured)
            and all(isinstance(data[name], str) for name in texts)
            and all(isinstance(data[name], bool) for name in flags)
        )
        if not ok:
            raise ValueError("a trial's values are not such as are measured")
        return cls(**data)


def rate(per_second: float) -> str:
    """Three digits, without an exponent: 0.0312, 3.12, 31,200."""
    if per_second >= 100:
        digits = 2 - math.floor(math.log10(per_second))
        return f"{round(per_second, digits):,.0f}"
    return f"{per_second:.3g}"


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
