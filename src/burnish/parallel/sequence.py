"""Sequence parallelism: between the divided layers, each rank works on its slice of the sequence.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models": a sum over the ranks
is a reduce-scatter and a gather, with norms, dropout and residuals in between on a slice each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from burnish.parallel.group import Mesh
from burnish.parallel.hooks import sync
from burnish.parallel.layers import ColumnParallel, RowParallel
from burnish.parallel.shard import is_summed, shard_of, sum_gradients


def stack_of(model: nn.Module, paths: Iterable[str]) -> str:
    """The path of the list of layers that all the divided modules in layers are in. ValueError where there is none."""
    found = {match.group(1) for path in paths if (match := re.match(r"(.+?)\.\d+\.", path))}
    if len(found) != 1 or not all(isinstance(model.get_submodule(path), nn.ModuleList) for path in found):
        raise ValueError("sequence_parallel: the divided modules must be in one list of layers, such as 'model.layers'")
    return found.pop()


def divide_sequences(model: nn.Module, stack: str, mesh: Mesh) -> None:
    """Has the divided layers of `stack` take, and hand on, slices of (batch, sequence, features)."""
    layers = model.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    for path, module in list(layers.named_modules()):
        if isinstance(module, RowParallel):
            module.scatters = True
        elif isinstance(module, ColumnParallel):
            owner = layers.get_submodule(path.rpartition(".")[0])
            if not any(isinstance(m, ColumnParallel) and m.is_in_region for m in owner.children()):
                sync(owner, "fwd_pre", "all_gather", mesh)  # once for queries, keys and values
            module.is_in_region = True
    for name, parameter in list(layers.named_parameters()):
        if shard_of(parameter) is None and not is_summed(parameter):  # norms, and biases behind the sums
            sum_gradients(model, f"{stack}.{name}", mesh)
    sync(layers[0], "fwd_pre", "own_slice", mesh)
    sync(layers[-1], "fwd_post", "all_gather", mesh, axis=1)
