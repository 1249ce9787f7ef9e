"""What the rewrites would save, place by place, and what stands in the way of those that almost apply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from burnish.record import unnumbered
from burnish.report.costs import Kind
from burnish.report.data import CUDA_GRAPH, Opportunity, Profile
from burnish.report.fusions import Fusion, Rewritten
from burnish.report.predict import CostModel
from burnish.report.rows import Rows, Seen, row_names

_LEAST = 0.005  # of all ops' time: what a single op must gain by another Impl to be told of
_HEAVIEST: tuple[Kind, ...] = ("product", "biased attention", "attention", "pass")


@dataclass(frozen=True)
class _Place:
    """Nodes of the captured graph that a rewrite takes (`fusion`), or almost."""

    rewrite: str
    nodes: tuple[fx.Node, ...]
    fusion: Fusion | None = None
    blocked_by: str = ""


def opportunities_of(
    rewritten: Rewritten,
    made: Seen,
    before: Seen,
    rows: Rows,
    costs: CostModel,
) -> tuple[Opportunity, ...]:
    """Every fusion of several ops, and every op that another Impl would make faster, by what they save; then the near
    misses.

    Args:
        made: the rewritten graph at the sizes of the call.
        before, rows: the captured graph, timed or predicted, and where its nodes stand in the report.
    """
    teller = _Teller(made, before, rows, costs)
    groups: dict[tuple[object, ...], list[_Place]] = {}
    for place in teller.places(rewritten):
        groups.setdefault(teller.key(place), []).append(place)
    found = _folded([teller.opportunity(places) for places in groups.values()])
    least = _LEAST * sum(map(teller.us, before.nodes))
    told = [each for each in found if len(each.nodes) > 1 or each.blocked_by or each.saves_us > least]
    return ranked(told)


def ranked(opportunities: Iterable[Opportunity]) -> tuple[Opportunity, ...]:
    """By what they save; the near misses last."""
    return tuple(sorted(opportunities, key=lambda each: (bool(each.blocked_by), -each.saves_us)))


def _folded(opportunities: Iterable[Opportunity]) -> list[Opportunity]:
    """With the places of a layer that takes what the others take and more, the mask that all of them read say, counted
    in with theirs."""
    found: list[Opportunity] = []
    for each in sorted(opportunities, key=lambda each: len(each.nodes)):
        for i, other in enumerate(found):
            if _alike(each) == _alike(other) and set(other.nodes) < set(each.nodes) and other.count >= each.count:
                found[i] = _together(other, each)
                break
        else:
            found.append(each)
    return found


def _alike(opportunity: Opportunity) -> tuple[str, str, str, str]:
    return opportunity.rewrite, opportunity.op, opportunity.block, unnumbered(opportunity.blocked_by)


def _together(first: Opportunity, other: Opportunity) -> Opportunity:
    """`first` with the other's places; times are means over all of them."""
    count = first.count + other.count
    before_us = (first.before_us * first.count + other.before_us * other.count) / count
    after_us = (first.after_us * first.count + other.after_us * other.count) / count
    return replace(first, count=count, before_us=before_us, after_us=after_us)


def capturing(
    profile: Profile, before: Seen, fusions: Iterable[Fusion], costs: CostModel, why_not: str
) -> list[Opportunity]:
    """A CUDA graph of the call, where that saves anything: the host launches the kernels of `profile` one by one.

    Args:
        fusions: what is to become of its ops. The kernels of others stay, and wait for each other in a graph, too.
        why_not: why the call cannot be captured; empty where it can.
    """
    fused = {name for fusion in fusions for name in fusion.taken}
    kept = sum(len(before.launches.get(node, ())) for node in before.nodes if node.name not in fused)
    after_us = min(costs.graph_us(kept), profile.unattributed_us)
    found = Opportunity(CUDA_GRAPH, "one launch", "", 1, (), profile.unattributed_us, after_us, blocked_by=why_not)
    return [found] if found.saves_us > _LEAST * profile.end_to_end_us else []


def with_captured(opportunities: Iterable[Opportunity], after: Profile, why_not: str) -> tuple[Opportunity, ...]:
    """The same opportunities with what the CUDA graph of `after` leaves; `why_not` says why there is none."""
    measured_us = None if why_not else after.unattributed_us
    return tuple(
        replace(each, measured_us=measured_us, blocked_by=why_not) if each.rewrite == CUDA_GRAPH else each
        for each in opportunities
    )


def with_measured(
    opportunities: Iterable[Opportunity], fusions: Iterable[Fusion], captured: Seen, rows: Rows, made: Seen
) -> tuple[Opportunity, ...]:
    """The same opportunities with the time of what was made at their places: `fusions` of the lowered graph `made`."""
    opportunities = tuple(opportunities)
    nodes = {node.name: node for node in captured.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    times: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for fusion in fusions:
        taken = [nodes[name] for name in sorted(filter(order.__contains__, fusion.taken), key=order.__getitem__)]
        us = sum(made.us.get(node, 0.0) for node in fusion.made)
        times.setdefault((row_names(taken, captured, rows), _made(fusion)), []).append(us)
    told = {each.nodes for each in opportunities}

    def measured_us(opportunity: Opportunity) -> float | None:
        found: list[float] = []
        for (names, op), us in times.items():
            folded = names not in told and op == opportunity.op and set(opportunity.nodes) < set(names)
            found += us if names == opportunity.nodes or folded else []
        return sum(found) / len(found) if found else None

    return tuple(each if each.blocked_by else replace(each, measured_us=measured_us(each)) for each in opportunities)


def _made(fusion: Fusion) -> str:
    return " + ".join(f"burnish.{op}" for op in fusion.ops)


class _Teller:
    """Knows the captured graph and the rewritten one, and puts equal places in folded layers together."""

    def __init__(self, made: Seen, before: Seen, rows: Rows, costs: CostModel) -> None:
        self._made, self._before, self._rows, self._costs = made, before, rows, costs
        self._order = {node.name: i for i, node in enumerate(before.nodes)}

    def places(self, rewritten: Rewritten) -> list[_Place]:
        found = [_Place(each.rewrite, self._nodes(each.taken), each) for each in rewritten.fusions]
        fused = {node for place in found if len(self._working(place.nodes)) > 1 for node in place.nodes}
        for miss in rewritten.misses:
            nodes = self._nodes(miss.nodes)
            if fused.isdisjoint(nodes):  # what another rewrite takes is not missed
                found.append(_Place(miss.rewrite, nodes, blocked_by=miss.reason))
        return [place for place in found if place.nodes]

    def key(self, place: _Place) -> tuple[object, ...]:
        """What places have in common that are one opportunity."""
        ops = tuple(place.fusion.ops) if place.fusion else ()
        return place.rewrite, ops, unnumbered(place.blocked_by), row_names(place.nodes, self._before, self._rows)

    def us(self, node: fx.Node) -> float:
        return self._before.us.get(node, 0.0) if self._before.us else self._before.predict_us(node, self._costs)

    def opportunity(self, places: Sequence[_Place]) -> Opportunity:
        first, count = places[0], len(places)
        before_us = sum(self.us(node) for place in places for node in place.nodes) / count
        # What the taken ops reach on this device, the op made of them will reach too.
        costs = self._costs.fitted((self._before.work[n], self.us(n)) for place in places for n in place.nodes)
        after_us = sum(self._after_us(place, costs) for place in places) / count
        return Opportunity(
            rewrite=first.rewrite,
            op=_made(first.fusion) if first.fusion else "",
            block=self._rows.row_of[max(first.nodes, key=self.us)][0],
            count=count,
            nodes=row_names(first.nodes, self._before, self._rows),
            before_us=before_us,
            after_us=min(after_us, before_us),  # an op that no Impl makes faster runs as before
            blocked_by=first.blocked_by,
        )

    def _nodes(self, names: Iterable[str]) -> tuple[fx.Node, ...]:
        """Those that have a row, in the order of execution."""
        known = sorted(self._order[name] for name in names if name in self._order)
        return tuple(self._before.nodes[i] for i in known)

    def _working(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [node for node in nodes if self._before.work[node].kind != "free"]

    def _after_us(self, place: _Place, costs: CostModel) -> float:
        if place.fusion is None:
            return self._in_one_us(place.nodes, costs)
        return sum(self._made.predict_us(node, costs) for node in place.fusion.made if node in self._made.work)

    def _in_one_us(self, nodes: Sequence[fx.Node], costs: CostModel) -> float:
        """What one kernel for all of them would take: nothing that only they read would go through memory."""
        working = self._working(nodes)
        if not working:
            return 0.0
        work = [self._before.work[node] for node in working]
        inner = [node for node in working if node.users and set(nodes).issuperset(node.users)]
        saved = sum(self._before.work[node].written * (1 + len(node.users)) for node in inner)
        fused = replace(
            min(work, key=lambda each: _HEAVIEST.index(each.kind)),
            flops=sum(each.flops for each in work),
            bytes=max(sum(each.bytes for each in work) - saved, 0.0),
        )
        return costs.predict_us(fused)
