"""Which blocks the attention kernel may use for given sizes, the most promising first."""

from __future__ import annotations

import torch

from burnish.kernels.launch import Config, Target

_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB of one block; else 99


def attention_configs(
    heads: int, lq: int, lk: int, d: int, dv: int, dtype: torch.dtype, target: Target
) -> list[Config]:
    """Configs (BLOCK_M queries x BLOCK_N keys) for `heads` heads in all of lq queries and lk keys."""
    return (
        [Config.of(4, 2, BLOCK_M=16, BLOCK_N=32, TMA=0)]
        if dtype == torch.float32
        else [Config.of(4, 2, BLOCK_M=64, BLOCK_N=64, TMA=0)]
    )
