"""`StepRecord`: what one step did to a Program."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_NUMBERS = re.compile(r"(?<=\w)_\d+\b|(?<=\.)\d+(?=\.)")  # linear_3, layers.3.mlp


@dataclass(frozen=True)
class NearMiss:
    """Where a rewrite almost matched: all places of a graph at which the same stood in its way.

    Attributes:
        rewrite: its name.
        reason: as it is said of the first place.
        nodes: the places' nodes, by name, in the graph as it was then; empty where nothing of the pattern is in it.
    """

    rewrite: str
    reason: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.nodes) - 1} more" if len(self.nodes) > 1 else ""
        return ": ".join([self.rewrite, *(node + more for node in self.nodes[:1]), self.reason])


def together(misses: Iterable[NearMiss]) -> list[NearMiss]:
    """Those of one rewrite and one reason as one, in the order of the first ones."""
    groups: dict[tuple[str, str], list[NearMiss]] = {}
    for miss in misses:
        groups.setdefault((miss.rewrite, unnumbered(miss.reason)), []).append(miss)
    return [
        NearMiss(rewrite, group[0].reason, tuple(dict.fromkeys(node for miss in group for node in miss.nodes)))
        for (rewrite, _), group in groups.items()
    ]


def unnumbered(reason: str) -> str:
    """What equal layers have in common: `reason` without the numbers of nodes ("linear_3") and modules ("layers.3.mlp")
    in it; other numbers stay."""
    return _NUMBERS.sub("", reason)


@dataclass
class StepRecord:
    """What one step did.

    Attributes:
        name: e.g. "capture", "raise", "fuse", "pack", "lower".
        matches: how often each rewrite matched, by its name.
        near_misses: where one almost matched, or was refused, with the reason.
        nodes_before, nodes_after: size of the graph.
        seconds: how long the step took.
        numerics: lines on what was verified; empty where nothing was.
        notes: anything else worth telling.
    """

    name: str
    matches: dict[str, int] = field(default_factory=dict)
    near_misses: list[NearMiss] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    numerics: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
