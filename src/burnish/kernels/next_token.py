"""What follows the choice of a token: who has ended, and the token's way to where it is kept and read next. One launch
where PyTorch's operations are several."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs


@triton.jit
def _next_token_kernel(
    chosen, finished, eos, token, sequences, fed, position, batch, eos_count, stride_sequence, pad,
    MAY_END: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.arange(0, BLOCK)
    there = row < batch
    taken, place = tl.load(chosen + row, mask=there, other=0), tl.load(fed) + 1
    if MAY_END:
        ended = tl.load(finished + row, mask=there, other=0) != 0
        taken = tl.where(ended, pad, taken)
        for i in range(eos_count):
            ended = ended | (taken == tl.load(eos + i))
        tl.store(finished + row, ended, mask=there)
    tl.store(token + row, taken, mask=there)
    tl.store(sequences + row.to(tl.int64) * stride_sequence + place, taken, mask=there)
    if ADVANCE:
        tl.store(fed, place)
        if position is not None:
            tl.store(position + row, tl.load(position + row, mask=there, other=0) + 1, mask=there)


def next_token(
    chosen: Tensor,
    finished: Tensor,
    eos: Tensor,
    token: Tensor,
    sequences: Tensor,
    fed: Tensor,
    position: Tensor | None,
    pad: int,
    may_end: bool,
    advance: bool,
) -> None:
    """Puts the `chosen` tokens (batch,) into `token` (batch, 1) and into `sequences` (batch, max length), behind column
    `fed`, a 0-dim tensor. If they may end, rows that are `finished` (batch,) take `pad` instead, and those whose token
    is one of `eos` (count,) are finished. With `advance`, adds 1 to `fed` and, where there is one, `position`
    (batch, 1). All int64 but `finished`, which is bool; all but `sequences` contiguous."""
    launch(
        _next_token_kernel,
        (1,),
        *(chosen, finished, eos, token, sequences, fed, position),
        *(chosen.shape[0], eos.shape[0], sequences.stride(0), pad),
        # One warp: what it loads, it has loaded before it stores.
        config=Config.of(num_warps=1, num_stages=1, BLOCK=triton.next_power_of_2(chosen.shape[0])),
        like=chosen,
        MAY_END=may_end,
        ADVANCE=advance,
    )
