"""The rewrites that almost apply, for every form of an Explanation: all places at which one reason blocks a rewrite are
one entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.record import unnumbered
from burnish.report import digest
from burnish.report.data import Explanation, Opportunity

_PLACES = 2  # of an entry: how many are named


@dataclass(frozen=True)
class Blocked:
    """A rewrite and why it does not apply.

    reason: as it is said of the first place. where: "transformer.h.*: ln_1, attn", or "the model". count: at how many
    places. saves_us: what it would save at all of them together.
    """

    rewrite: str
    reason: str
    where: str
    count: int
    saves_us: float


def blocked(explanation: Explanation) -> list[Blocked]:
    """By what they would save."""
    places = digest.places(explanation)
    groups: dict[tuple[str, str], list[Opportunity]] = {}
    for each in digest.blocked(explanation.opportunities):
        groups.setdefault((each.rewrite, unnumbered(each.blocked_by)), []).append(each)
    found = [
        Blocked(
            rewrite,
            group[0].blocked_by,
            _named([*dict.fromkeys(places[each] or "the model" for each in group)]),
            sum(each.count for each in group),
            sum(each.saves_us for each in group),
        )
        for (rewrite, _), group in groups.items()
    ]
    return sorted(found, key=lambda each: -each.saves_us)


def _named(places: Sequence[str]) -> str:
    rest = len(places) - _PLACES
    return "; ".join([*places[:_PLACES], f"and {rest} more"] if rest > 1 else places)
