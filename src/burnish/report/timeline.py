"""The kernels of one block in time: which block it is, and lanes in which no two kernels overlap."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.report.data import Block, Explanation, OpRow, Profile, Span


def timed_block(explanation: Explanation) -> tuple[Profile, Block] | None:
    """The version and the block that the timeline shows: the one with a row for most of its kernels."""
    wanted = {span.row for span in explanation.timeline}
    profiles = [profile for profile in (explanation.after, explanation.before) if profile]
    blocks = [(profile, block) for profile in profiles for block in profile.blocks]
    found = max(blocks, key=lambda each: len(wanted & {row.name for row in each[1].rows}), default=None)
    return found if wanted else None


def timed_rows(explanation: Explanation) -> dict[str, OpRow]:
    """The rows of that block by name; a kernel of none of them has no row."""
    found = timed_block(explanation)
    return {row.name: row for row in found[1].rows} if found else {}


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans in as few lanes as keep them apart, each in the first that is free at its start."""
    filled: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start_us):
        for lane in filled:
            last = lane[-1]
            if last.start_us + last.us <= span.start_us + 1e-6:
                lane.append(span)
                break
        else:
            filled.append([span])
    return filled
