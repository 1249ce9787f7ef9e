"""Launches of kernels that are told on the device how many rows are wanted, at BERT-base's sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.kernels.families import FAMILIES
from burnish.kernels.launch import Target
from burnish.kernels.matmul_configs import Product
from burnish.ops import add_layer_norm, embedding_layer_norm


def launch_told(live_rows: Tensor, capability: int, everything: bool) -> None:
    """The first config of each, or all of them."""
    target = Target(divmod(capability, 10), 132)
    x, hidden = torch.empty(1, 4096, 768, dtype=torch.float16), torch.empty(1, 4096, 3072, dtype=torch.float16)
    vector, ids = x[0, 0], torch.empty(1, 4096, dtype=torch.int64)
    table = torch.empty(512, 768, dtype=torch.float16)
    add_layer_norm.impls["triton"].fn(x, x, vector, vector, live_rows=live_rows)
    tables = (ids, table, ids, table, ids, table)
    embedding_layer_norm.impls["triton"].fn(*tables, vector, vector, live_rows=live_rows)
    family = FAMILIES["wgmma" if capability == 90 else "matmul"]
    for given, columns, activation in ((x, 3072, "gelu"), (hidden, 768, "none")):
        weight, bias = torch.empty(columns, given.shape[2], dtype=torch.float16), hidden[0, 0, :columns]
        configs = family.configs(Product(2304, columns, given.shape[2], torch.float16, target))
        for config in configs if everything else configs[:1]:
            family.multiply(given, weight, bias, activation, config=config, live_rows=live_rows)
