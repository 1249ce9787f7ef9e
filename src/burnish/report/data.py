"""What a Report is made of: plain values that were measured or predicted, with no model behind them.

A `Profile` is one version of a model on one device: its `Block`s in the order of execution, each a list of `OpRow`s
with the `Kernel`s that ran for them. An `Opportunity` is a rewrite and what it saves. Times are microseconds, counts
are floating-point operations and bytes. Everything here becomes JSON by `dataclasses.asdict`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["memory", "compute", "launch", "host"]
"""What keeps an op from being faster: moving its bytes, its arithmetic, the fixed cost of a kernel that is too short
for either to count, or the host, where there is nothing to do on the device (a view)."""


CUDA_GRAPH = "CUDA graph"
"""The Opportunity that is no rewrite: to capture the launches of a call once, and to replay them as one."""


NOT_IN_USE = "optimized, not in use"
"""The version of a Profile of what was made of a model, where the original serves its calls."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or on the CPU an operator of PyTorch, that ran for an op.

    launches: how often in one block, a mean where blocks are folded. us: of all launches together. grid, block: of the
    launch, where the profiler tells.
    """

    name: str
    launches: float
    us: float
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpRow:
    """One op of a block, once. Where a block is folded, `us` and the kernels' times are the mean over its repeats.

    name: the node in the first of the folded blocks. op: "aten.linear" or "burnish.linear_add_layer_norm".
    module: the path of the submodule that it belongs to, seen from the block ("attention.self.query").
    source: "modeling_bert.py:312", and code: that line. inputs, output: "float16[1, 128, 768]".
    us: measured time; None where it was not measured (a prediction). predicted_us: from the cost alone.
    floor_us: the larger of bytes over bandwidth and FLOPs over the matrix rate. impl: after lowering, what runs.
    """

    name: str
    op: str
    module: str
    source: str
    code: str
    inputs: tuple[str, ...]
    output: str
    dtype: str
    flops: float
    bytes: float
    floor_us: float
    predicted_us: float
    bound: Bound
    us: float | None = None
    kernels: tuple[Kernel, ...] = ()
    impl: str | None = None

    @property
    def shown_us(self) -> float:
        """Measured where it was measured, else predicted."""
        return self.predicted_us if self.us is None else self.us

    @property
    def share_of_floor(self) -> float:
        """1.0 where the op runs as fast as the device allows; 0.0 for what needs no time at all."""
        return self.floor_us / self.shown_us if self.shown_us else 0.0


@dataclass(frozen=True)
class Block:
    """A submodule whose ops stand together, or several that are alike, folded into one.

    path: "encoder.layer.*" where `count` of them are folded. kind: the class, "BertLayer".
    Sums (`us`, `floor_us`, ...) are of one of them; times `count` they are the block's share of the model.
    """

    path: str
    kind: str
    count: int
    rows: tuple[OpRow, ...]

    @property
    def us(self) -> float:
        return sum(row.shown_us for row in self.rows)

    @property
    def floor_us(self) -> float:
        return sum(row.floor_us for row in self.rows)

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    @property
    def launches(self) -> float:
        return sum(kernel.launches for row in self.rows for kernel in row.kernels)


@dataclass(frozen=True)
class Profile:
    """One version of a model ("as it was", "optimized") on one device.

    end_to_end_us: a call as the caller sees it; predicted where `predicted`. `unattributed_us` is what of it no op
    accounts for: the host, where a GPU waits for it, or Python between the ops. floor_us: of all ops as they are; fused
    ones need less.
    bandwidth_gbs, gflops: the ceilings that the floors come from, GB/s and GFLOP/s by dtype. calls: how many were
    timed, of which `end_to_end_us` is the mean over the fastest third. cuda: whether the device is a GPU, which may
    have to wait for the host; a CPU is the host itself.
    """

    version: str
    device: str
    predicted: bool
    blocks: tuple[Block, ...]
    end_to_end_us: float
    bandwidth_gbs: float = 0.0
    gflops: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    cuda: bool = True

    @property
    def rows(self) -> list[tuple[Block, OpRow]]:
        """Every row with its block, in the order of execution."""
        return [(block, row) for block in self.blocks for row in block.rows]

    @property
    def attributed_us(self) -> float:
        return sum(block.us * block.count for block in self.blocks)

    @property
    def unattributed_us(self) -> float:
        return self.end_to_end_us - self.attributed_us

    @property
    def floor_us(self) -> float:
        return sum(block.floor_us * block.count for block in self.blocks)

    @property
    def launches(self) -> int:
        return round(sum(block.launches * block.count for block in self.blocks))


@dataclass(frozen=True)
class Opportunity:
    """What a rewrite does, or could do, at `count` places that are alike.

    rewrite: its name. op: what it makes. block: the path of the Block. nodes: names of the `OpRow`s that it takes, in
    the first of the folded blocks. before_us: theirs; after_us: the fused op's predicted time, at each place.
    measured_us: what the fused op takes there, where `optimize` has run. blocked_by: why it does not apply (a near
    miss), empty where it does.
    Of `CUDA_GRAPH` the times are of the call without its ops, and `block` and `nodes` are empty.
    """

    rewrite: str
    op: str
    block: str
    count: int
    nodes: tuple[str, ...]
    before_us: float
    after_us: float
    measured_us: float | None = None
    blocked_by: str = ""

    @property
    def saves_us(self) -> float:
        """Predicted, at all places together."""
        return (self.before_us - self.after_us) * self.count

    @property
    def saved_us(self) -> float | None:
        """Measured, at all places together."""
        return None if self.measured_us is None else (self.before_us - self.measured_us) * self.count


@dataclass(frozen=True)
class GraphPicture:
    """A block's graph for drawing: nodes as (name, op, group) where `group` says which fusion a node belongs to ("" for
    none), edges as pairs of names."""

    title: str
    nodes: tuple[tuple[str, str, str], ...]
    edges: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Span:
    """A kernel on the timeline of one block: `start_us` counts from the block's first. row: the `OpRow`'s name."""

    name: str
    row: str
    start_us: float
    us: float


@dataclass(frozen=True)
class Explanation:
    """Everything that was found out about a model on these inputs; `Report` shows it.

    inputs: "input_ids int64[1, 128]". before: the model as it was; after: optimized, or None.
    timeline: of one block of `after`, else of `before`. code: of the generated graph. dtype: of the weights that are
    floats, "bfloat16". torch: its version. rewrites: names of the user's own that were looked for.
    """

    model: str
    inputs: tuple[str, ...]
    before: Profile
    after: Profile | None = None
    opportunities: tuple[Opportunity, ...] = ()
    pictures: tuple[GraphPicture, ...] = ()
    timeline: tuple[Span, ...] = ()
    code: str = ""
    notes: tuple[str, ...] = field(default=())
    dtype: str = ""
    torch: str = ""
    rewrites: tuple[str, ...] = ()
