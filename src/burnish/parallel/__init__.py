"""Models on several devices: collectives that graphs can hold, and layers of which each rank has a part."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.parallel.collectives import all_gather, all_reduce, copy_to_region, own_slice, reduce_scatter
    from burnish.parallel.divide import tensor_parallel
    from burnish.parallel.hooks import SYNCS, missing_syncs, sync
    from burnish.parallel.loading import load_sharded
    from burnish.parallel.plan import STYLES
    from burnish.parallel.shard import Shard, full_state_dict, shard_parameter
    from burnish.parallel.symmetric import set_up_symmetric_memory

# Loaded on first use: who optimizes a model on one device needs none of them.
_HOME = {
    "STYLES": "plan",
    "SYNCS": "hooks",
    "Shard": "shard",
    "all_gather": "collectives",
    "all_reduce": "collectives",
    "copy_to_region": "collectives",
    "full_state_dict": "shard",
    "load_sharded": "loading",
    "missing_syncs": "hooks",
    "own_slice": "collectives",
    "reduce_scatter": "collectives",
    "set_up_symmetric_memory": "symmetric",
    "shard_parameter": "shard",
    "sync": "hooks",
    "tensor_parallel": "divide",
}

__all__ = [
    "STYLES",
    "SYNCS",
    "Shard",
    "all_gather",
    "all_reduce",
    "copy_to_region",
    "full_state_dict",
    "load_sharded",
    "missing_syncs",
    "own_slice",
    "reduce_scatter",
    "set_up_symmetric_memory",
    "shard_parameter",
    "sync",
    "tensor_parallel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'burnish.parallel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"burnish.parallel.{_HOME[name]}"), name)
