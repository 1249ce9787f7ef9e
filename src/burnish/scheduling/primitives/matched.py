"""What primitives that take a match accept as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.graph import Pattern
from burnish.scheduling.find import FoundModule, FoundNode, Occurrence, Result, why_nothing
from burnish.scheduling.locate import Site, locate

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule

_RESULTS = (Occurrence, FoundNode, FoundModule)


def results_of(schedule: Schedule, match: Any, primitive: str) -> list[Result]:
    """The results of `find` that `match` is: one, a list of them, or a query that is looked for now.

    Raises ValueError where there are none, TypeError for what is no match.
    """
    if isinstance(match, (str, Pattern)) or callable(match):
        results: list[Any] = schedule.find(match)
        if not results:
            reason = why_nothing(schedule.tree, schedule.path, match, schedule.known_call)
            raise ValueError(f"{primitive}: nothing in {schedule.label} matches{reason}")
        return results
    if isinstance(match, _RESULTS):
        match = [match]
    if not isinstance(match, (list, tuple)):
        raise TypeError(f"{primitive}: match must be what find() returns, or a query for it, got {match!r}")
    if not match:
        raise ValueError(f"{primitive}: match is empty: find() found nothing")
    for item in match:
        if not isinstance(item, _RESULTS):
            raise TypeError(f"{primitive}: match must be what find() returns, or a query for it, got {item!r} in it")
        for path in item.origin.modules:
            if not f"{path}.".startswith(f"{schedule.path}." if schedule.path else ""):
                raise ValueError(f"{primitive}: the match is in {path or 'the model'}, not in {schedule.path}")
    return list(match)


def sites_of(schedule: Schedule, match: Any, primitive: str) -> list[Site]:
    """The modules to be rewritten for `match`; see `results_of` and `locate`."""
    sites = locate(schedule.tree, results_of(schedule, match, primitive), schedule.known_call)
    for site in sites:
        nodes = [node for found in site.matches for node in found.nodes]
        if len(set(nodes)) != len(nodes):
            raise ValueError(f"{primitive}: two of the matches have nodes in common")
    schedule.check_graphs({site.owner: site.gm for site in sites})
    return sites
