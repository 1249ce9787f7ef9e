"""What every form of an Explanation shows: the costliest parts, the rewrites by what they save."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from burnish.report.data import CUDA_GRAPH, Block, Explanation, Opportunity, OpRow, Profile

UNATTRIBUTED, END_TO_END = "unattributed", "end to end"
_LEAST = 0.02  # of its part's time: what an op takes at least to be named there
_MODULES = 3  # of a rewrite: how many are named
# What PyTorch calls our Ops where it has another name for them.
_SAME_AS = {"addmm": "linear", "mm": "linear", "scaled_dot_product_attention": "attention"}
LARGE_BLOCKS, SMALL_BLOCK = 4, 0.02  # how many blocks a short report shows, and what share of all ops each is at least


@dataclass(frozen=True)
class Unit:
    """The unit of an explanation's tables: one for all, so that columns can be compared by eye."""

    name: str
    us: float
    decimals: int

    def __call__(self, us: float, more: int = 0) -> str:
        """The number alone; `more` decimals where it is small beside the others."""
        return f"{us / self.us:,.{self.decimals + more}f}"


@dataclass(frozen=True)
class Part:
    """A submodule of a Block: what a reader would call one thing that costs time.

    name: "h.*.mlp.c_fc". ops: what takes its time, in order ("3 mul", "tanh"). us, floor_us: at all `count` places
    together.
    """

    name: str
    count: int
    rows: tuple[OpRow, ...]
    us: float
    floor_us: float

    @property
    def ops(self) -> tuple[str, ...]:
        least = _LEAST * self.us / self.count
        met = Counter(op_name(row.op) for row in self.rows if row.shown_us > least)
        return tuple(op if times == 1 else f"{times} {op}" for op, times in met.items())


@dataclass(frozen=True)
class Sum:
    """What a line of a table adds up."""

    us: float
    floor_us: float = 0.0
    launches: int = 0


@dataclass(frozen=True)
class Line:
    """A Block at all its places, or (`block` is None) the unattributed time or the whole call.

    after: None where there is no optimized version.
    """

    name: str
    block: Block | None
    before: Sum
    after: Sum | None

    @property
    def shown(self) -> Sum:
        return self.after or self.before

    @property
    def speedup(self) -> float | None:
        """None where a version is missing, or has no time for this; and of what is unattributed, which is no work."""
        if self.after is None or self.before.us <= 0 or self.after.us <= 0 or self.name == UNATTRIBUTED:
            return None
        return self.before.us / self.after.us


def unit_of(explanation: Explanation) -> Unit:
    longest = max(profile.end_to_end_us for profile in (explanation.before, explanation.after) if profile)
    return Unit("ms", 1e3, 2) if longest >= 1e5 else Unit("us", 1.0, 1)


def op_name(op: str) -> str:
    """`op` without its namespace: "aten.linear" -> "linear"."""
    return op.rpartition(".")[2] or op


def short_shape(text: str) -> str:
    """ "float16[1, 128, 768]" -> "f16[1,128,768]": what fits a column."""
    letters = {"bfloat": "bf", "float": "f", "int": "i", "uint": "u"}
    short = re.sub(r"\b(bfloat|float|int|uint)(?=\d\w*\[)", lambda found: letters[found[1]], text)
    return short.replace(", ", ",")


def kernel_name(name: str) -> str:
    """A C++ kernel's name without return type, namespaces and template arguments, which fill a screen."""
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    plain = re.split(r"[<(]", plain, maxsplit=1)[0].rpartition("::")[2].strip()
    return plain or name


def block_name(block: Block) -> str:
    return block.path or block.kind


def block_title(block: Block) -> str:
    """ "h.* (12 x GPT2Block)", or "lm_head (Linear)"."""
    about = f"{block.count} x {block.kind}" if block.count > 1 else block.kind
    return f"{block.path} ({about})" if block.path else about


def row_name(block: Block, row: OpRow) -> str:
    """The submodule that a row belongs to, seen from the model."""
    return ".".join(part for part in (block.path, row.module) if part) or block.kind


def parts(profile: Profile) -> list[Part]:
    """The parts of the model, costliest first; the unattributed time is one of them."""
    found = []
    for block in profile.blocks:
        by_name: dict[str, list[OpRow]] = {}
        for row in block.rows:
            by_name.setdefault(row_name(block, row), []).append(row)
        for name, rows in by_name.items():
            us = sum(row.shown_us for row in rows) * block.count
            floor_us = sum(row.floor_us for row in rows) * block.count
            found.append(Part(name, block.count, tuple(rows), us, floor_us))
    found.append(Part(UNATTRIBUTED, 1, (), profile.unattributed_us, 0.0))
    return sorted(found, key=lambda part: -part.us)


def lines(explanation: Explanation) -> list[Line]:
    """Where a call's time goes, in the order of execution: the blocks, the unattributed time; the last is their sum."""
    versions = [profile for profile in (explanation.before, explanation.after) if profile]
    by_path = [{block.path: block for block in profile.blocks} for profile in versions]

    def line(name: str, block: Block | None, sums: Sequence[Sum]) -> Line:
        return Line(name, block, sums[0], sums[1] if len(sums) > 1 else None)

    found = []
    for path in dict.fromkeys(path for blocks in by_path for path in blocks):
        block = next(blocks[path] for blocks in reversed(by_path) if path in blocks)
        found.append(line(block_title(block), block, [_all_places(blocks.get(path)) for blocks in by_path]))
    found.append(line(UNATTRIBUTED, None, [Sum(profile.unattributed_us) for profile in versions]))
    wholes = [Sum(profile.end_to_end_us, profile.floor_us, profile.launches) for profile in versions]
    return [*found, line(END_TO_END, None, wholes)]


def _all_places(block: Block | None) -> Sum:
    if block is None:
        return Sum(0.0)
    return Sum(block.us * block.count, block.floor_us * block.count, round(block.launches * block.count))


def launches(row: OpRow) -> int:
    """How many kernels run for a row; of one that only some of the folded blocks have, as in those."""
    return math.ceil(sum(kernel.launches for kernel in row.kernels))


def large_blocks(profile: Profile) -> tuple[list[Block], list[Block]]:
    """The blocks whose ops a short report shows, costliest first, and those that it sums up."""
    ranked = sorted(profile.blocks, key=lambda block: -block.us * block.count)
    least = SMALL_BLOCK * profile.attributed_us
    large = [block for block in ranked[:LARGE_BLOCKS] if block.us * block.count >= least] or ranked[:1]
    return large, ranked[len(large) :]


def is_done(explanation: Explanation) -> bool:
    """Whether the rewrites were applied and measured; else they are what could be done."""
    return explanation.after is not None and not explanation.after.predicted


def possible(opportunities: Iterable[Opportunity]) -> list[Opportunity]:
    """The rewrites that apply, by what they save: measured where it was measured, else predicted."""
    return sorted((each for each in opportunities if not each.blocked_by), key=lambda each: -saving_us(each))


def blocked(opportunities: Iterable[Opportunity]) -> list[Opportunity]:
    """The near misses, by what they would save."""
    return sorted((each for each in opportunities if each.blocked_by), key=lambda each: -each.saves_us)


def saving_us(opportunity: Opportunity) -> float:
    measured = opportunity.saved_us
    return opportunity.saves_us if measured is None else measured


def places(explanation: Explanation) -> dict[Opportunity, str]:
    """Where each rewrite is: the submodules whose ops take the time there ("h.*.mlp: c_fc, act"), else its block.
    A CUDA graph is of the whole call."""
    rows = {(block.path, row.name): row for block in explanation.before.blocks for row in block.rows}
    found = {}
    for each in explanation.opportunities:
        taken = [rows[each.block, node] for node in each.nodes if (each.block, node) in rows]
        least = _LEAST * each.before_us
        modules = dict.fromkeys(row.module for row in taken if row.module and row.shown_us >= least)
        paths = [f"{each.block}.{module}" if each.block else module for module in modules]
        found[each] = "the whole call" if each.rewrite == CUDA_GRAPH else _together(paths, each.block)
    return found


def makes(explanation: Explanation) -> dict[Opportunity, str]:
    """What each rewrite makes: the op, of one that becomes the same op "linear, by a faster kernel"."""
    ops = {(block.path, row.name): op_name(row.op) for block in explanation.before.blocks for row in block.rows}
    found = {}
    for each in explanation.opportunities:
        made = op_name(each.op)
        taken = {ops.get((each.block, node), "") for node in each.nodes}
        same = len(each.nodes) == 1 and {_SAME_AS.get(op, op) for op in taken} == {made}
        found[each] = f"{made}, by a faster kernel" if same else made
    return found


def _together(paths: Sequence[str], default: str) -> str:
    """Paths with what they share said once; one that contains the others says nothing beside them."""
    if len(paths) < 2:
        return paths[0] if paths else default
    parts = [path.split(".") for path in paths]
    shared = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))]
    names = [".".join(each[len(shared) :]) for each in parts if len(each) > len(shared)]
    if len(names) > _MODULES:
        names = [*names[:_MODULES], f"and {len(names) - _MODULES} more"]
    return ": ".join(filter(None, (".".join(shared), ", ".join(names))))


def counted_once(opportunities: Iterable[Opportunity]) -> list[Opportunity]:
    """The rewrites that apply, without a CUDA graph; of two that take the same op only the one that saves more."""
    taken: set[tuple[str, str]] = set()
    found = []
    for each in possible(opportunities):
        places = {(each.block, node) for node in each.nodes}
        if each.rewrite != CUDA_GRAPH and taken.isdisjoint(places):
            taken |= places
            found.append(each)
    return found


def together_us(opportunities: Iterable[Opportunity]) -> float:
    """What the rewrites that apply save together, without a CUDA graph: an op that two of them take is counted once,
    for the larger."""
    return sum(max(saving_us(each), 0.0) for each in counted_once(opportunities))


def capturing_us(opportunities: Iterable[Opportunity]) -> float:
    """What a CUDA graph saves; 0.0 where none is possible, or none is needed."""
    return sum(saving_us(each) for each in possible(opportunities) if each.rewrite == CUDA_GRAPH)


def left_us(explanation: Explanation) -> float:
    """What a call would take with a CUDA graph and all that can be fused: never less than the fused ops alone."""
    found = explanation.opportunities
    saved = capturing_us(found) + together_us(found)
    made_us = sum(each.after_us * each.count for each in counted_once(found))
    return max(explanation.before.end_to_end_us - saved, made_us)


def percent(part: float, whole: float) -> str:
    """A share with two digits: "4.2%", "87%"; "" of nothing."""
    if not whole:
        return ""
    share = 100 * part / whole
    return f"{share:.0f}%" if abs(share) >= 9.95 else f"{share:.1f}%"


def share_of_floor(floor_us: float, us: float) -> str:
    """`percent`, but "" where there is no floor to have a share of."""
    return percent(floor_us, us) if floor_us else ""


def costliest(rows: Sequence[OpRow], most: int) -> tuple[list[OpRow], list[OpRow]]:
    """The rows that a short table shows, costliest first, and those that it sums up."""
    ranked = sorted(rows, key=lambda row: -row.shown_us)
    shown = [row for row in ranked if row.shown_us > 0][:most]
    # A line for a single row left over would say less than the row.
    if len(ranked) - len(shown) == 1:
        shown = ranked
    return shown, ranked[len(shown) :]
