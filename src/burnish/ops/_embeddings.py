"""What the Ops that look rows up in tables have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.ops._common import check_floating, check_same_dtype


def check_lookups(
    ids: Tensor, word: Tensor, indices: dict[str, Tensor | None], tables: dict[str, Tensor | None]
) -> None:
    """Raises unless `ids` are (B, S), the other `indices` so too or (1, S), and the `tables` are as wide as `word`."""
    if ids.dim() != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be (batch, sequence)")
    for name, index in {"ids": ids, **indices}.items():
        if index is None:
            continue
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {index.dtype}; it must be int32 or int64")
        if index.dim() != 2 or index.shape[1] != ids.shape[1] or index.shape[0] not in (1, ids.shape[0]):
            raise ValueError(
                f"{name} has shape {tuple(index.shape)}; it must be that of ids, {tuple(ids.shape)}, or (1, S)"
            )
    for name, table in {"word": word, **tables}.items():
        if table is None:
            continue
        check_floating(name, table)
        if table.dim() != 2 or table.shape[1] != word.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; it must be (entries, {word.shape[-1]})")
        check_same_dtype(name, table, "word", word)


def stored_by_rows(**tables: Tensor | None) -> list[str]:
    """Why a kernel does not take a table whose rows do not lie in one piece."""
    return [
        f"{name} is not stored row by row (its strides are {tuple(table.stride())})"
        for name, table in tables.items()
        if table is not None and table.shape[1] > 1 and table.stride(1) != 1
    ]
