"""`StepRecord`: what one step did to a Program."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StepRecord:
    """What one step did.

    Attributes:
        name: e.g. "capture", "raise", "fuse", "pack", "lower".
        matches: how often each rewrite matched, by its name.
        near_misses: one line for each place that almost matched, with the reason; and each refusal.
        nodes_before, nodes_after: size of the graph.
        seconds: how long the step took.
        numerics: lines on what was verified; empty where nothing was.
        notes: anything else worth telling.
    """

    name: str
    matches: dict[str, int] = field(default_factory=dict)
    near_misses: list[str] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    numerics: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
