"""What a matrix product's configs are chosen for, and the configs of the plain kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from burnish.kernels.launch import Config, Target, target_of


@dataclass(frozen=True)
class Product:
    """What a matrix product's configs are chosen for: x of `rows` x `depth` times `columns` rows of weight.

    If gated, twice as many rows of weight.
    """

    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    target: Target
    gated: bool = False
    plain: bool = True  # x and weight are contiguous along K, as 16-byte loads need

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, gated: bool = False) -> Product:
        columns = weight.shape[0] // 2 if gated else weight.shape[0]
        plain = x.stride(-1) == weight.stride(1) == 1
        return cls(x.numel() // x.shape[-1], columns, x.shape[-1], x.dtype, target_of(x), gated, plain)

    @property
    def halves(self) -> int:
        """Rows of weight for each column of the result."""
        return 2 if self.gated else 1


def shared_memory(target: Target) -> int:
    """The bytes that one block may use. Source: CUDA programming guide, technical specifications per capability."""
    if target.capability[0] in (9, 10):
        return 232_448
    return 166_912 if target.capability in ((8, 0), (8, 7)) else 101_376


def stage_bytes(config: Config, product: Product) -> int:
    """Shared memory for one block of each operand."""
    return (config["BLOCK_M"] + product.halves * config["BLOCK_N"]) * config["BLOCK_K"] * product.dtype.itemsize


def programs_per_sm(config: Config, product: Product) -> int:
    """How many programs an SM has shared memory for, 1 or 2."""
    nbytes = stage_bytes(config, product) * config.num_stages + 1024  # which the system takes of each
    return 2 if 2 * nbytes <= shared_memory(product.target) else 1


def fitting(configs: list[Config], product: Product) -> list[Config]:
    """Those whose pipeline fits the device's shared memory, each once."""
    most = shared_memory(product.target) - 2048  # barriers and the split's count want some too
    fit = (config for config in configs if stage_bytes(config, product) * config.num_stages <= most)
    return list(dict.fromkeys(fit))


def matmul_configs(product: Product) -> list[Config]:
    """Configs of `matmul`, the most promising first."""
    # (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), BLOCK_N of both halves together if gated. 128x64 with 4 warps spills
    # registers on sm_80, 32x64x128 in two halves on sm_90.
    if product.dtype == torch.float32:
        # Exact float32 products run on the ordinary cores: what counts is the registers that the operands take.
        shapes = [(16, 32, 64, 4, 3)] if product.rows <= 32 else [(32, 32, 32, 4, 3)]
        shapes += [(64, 64, 16, 8, 3)] if product.rows > 32 and not product.gated else []
    elif product.rows <= 32:
        m = 16 if product.rows <= 16 else 32
        shapes = [(m, 64, 64, 4, 5), (m, 128, 64, 4, 4)]
        shapes += [(m, 32, 64, 4, 6)] if product.gated else [(m, 32, 128, 4, 5), (m, 64, 128, 8, 4)]
    elif not product.plain:  # loads entry by entry keep so many pointers that deeper tiles spill registers
        shapes = [(64, 32, 64, 4, 5), *([] if product.gated else [(64, 64, 32, 4, 4)])]
    elif product.rows <= 128:
        # 64x64x128 and 64x32x64, 5 stages, 4 warps were a sweep's best on H200 at 128 rows and BERT-base's weights.
        deep = [] if product.target.capability[0] == 8 else [(64, 64, 128, 4, 4), (64, 32, 128, 4, 4)]
        shapes = [*deep, (64, 32, 64, 4, 5), (64, 64, 64, 4, 5), (128, 64, 64, 8, 4)]
        shapes += [(32, 64, 64, 4, 5)] if product.gated else [(32, 64, 128, 4, 4)]
    elif product.rows <= 1024:
        # Bound by latency: all tiles at once, so two or three programs to an SM.
        wide = 8 if product.target.capability[0] == 8 else 4
        # Gated, 64x128 spills on sm_80 with 8 warps.
        shapes = [] if wide == 8 and product.gated else [(64, 128, 64, wide, 4)]
        shapes += [(64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (128, 64, 64, wide, 4)]
        shapes += [(128, 128, 64, 8, 3), (128, 64, 128, 8, 3), (64, 64, 128, 4, 4)]
    else:
        shapes = [(128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 5)]
    configs = []
    for m, n, k, warps, stages in shapes:
        block_n, block_k = n // product.halves, max(16, min(k, triton.next_power_of_2(product.depth)))
        blocks = {"BLOCK_M": m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "SPLIT_K": 1}
        whole = Config.of(num_warps=warps, num_stages=stages, **blocks)
        if 128 < product.rows <= 1024 and product.dtype != torch.float32:
            splits = _few_splits(product, whole)
        else:
            splits = _splits(product, m, block_n, block_k)
        configs += [Config.of(warps, stages, **{**blocks, "SPLIT_K": split}) for split in splits]
    # Where tiles can be copied by TMA, that kernel wins from a few hundred rows on (384: 5.8 us against 6.6).
    described = product.target.tma and product.plain and product.dtype != torch.float32
    configs = configs[: 3 if described and product.rows > (256 if product.gated else 1024) else 10]
    # A weight this small is a launch's latency whatever the blocks.
    return fitting(configs, product)[: 1 if product.columns * product.depth < 1 << 16 else None]


def _splits(product: Product, block_m: int, block_n: int, block_k: int) -> list[int]:
    """In how many parts to sum over K: so many that every SM has a program or two; 1 where the tiles fill them."""
    if block_m * block_n * product.halves > (1024 if product.dtype == torch.float32 else 4096):
        return [1]  # the sum of larger tiles' parts spills registers
    tiles = triton.cdiv(product.rows, block_m) * triton.cdiv(product.columns, block_n)
    most = triton.cdiv(product.depth, block_k) // 3  # a shorter part does nothing but fill its pipeline
    # Few rows are bound by memory: there every SM needs several programs in flight.
    wanted = (2, 4) if product.rows <= 32 else (1, 2)
    splits = [1] if product.rows > 32 else []  # a second pass over the parts may cost more than idle SMs
    for per_sm in wanted:
        ideal = min(most, product.target.num_sms * per_sm / tiles)
        splits.append(min((1, 2, 3, 4, 8, 12, 16), key=lambda split: abs(split - ideal)))
    return list(dict.fromkeys(splits))


def _few_splits(product: Product, config: Config) -> list[int]:
    """1, and where the tiles leave half of what runs at once idle, 2 or 3."""
    tiles = triton.cdiv(product.rows, config["BLOCK_M"]) * triton.cdiv(product.columns, config["BLOCK_N"])
    most = min(3, triton.cdiv(product.depth, config["BLOCK_K"]) // 3)
    at_once = product.target.num_sms * programs_per_sm(config, product)
    return list(dict.fromkeys((1, max(1, min(most, at_once // tiles)))))
