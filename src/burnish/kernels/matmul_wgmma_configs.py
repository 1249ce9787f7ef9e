"""Which tiles the Gluon product may use for given sizes, the most promising first; for all there is shared memory.

A shape is (BLOCK_M, BLOCK_N, MORE_N, BLOCK_K, TEAMS, STAGES, PER_SM, warps), FINISH where a team of its own
finishes tiles (so many rows of a program's last one are left to those who multiplied), and PIECE where the last tiles
are cut into pieces of so many columns.
"""

from __future__ import annotations

import triton

from burnish.kernels.launch import Config
from burnish.kernels.matmul_configs import Product


def matmul_wgmma_configs(product: Product) -> list[Config]:
    """Configs of `matmul_wgmma`; if gated, a shape's columns are those of both halves together."""
    # Beyond a wave what bounds all of them is traffic from the L2 cache (8 TB/s on H200), so tiles are as large as they
    # can be; 128x192 fits BERT-base's sizes: 4096 rows are 1, 3 and 4 waves of it.
    shapes: list[tuple[int, ...]]
    if product.rows <= 160:
        shapes = [(64, 64, 0, 128, 1, 6, 1, 4), (64, 32, 0, 128, 1, 4, 2, 4), (64, 64, 0, 64, 1, 12, 1, 4)]
        shapes += [(64, 128, 0, 64, 1, 8, 1, 4)]
    elif product.rows <= 1024:
        shapes = [(64, 64, 0, 64, 1, 4, 3, 4), (64, 64, 0, 128, 1, 6, 1, 4), (64, 128, 0, 64, 1, 8, 1, 4)]
        shapes += [(64, 64, 0, 64, 1, 6, 2, 4), (64, 128, 0, 64, 1, 4, 2, 4), (64, 128, 64, 64, 1, 6, 1, 4)]
        shapes += [(64, 128, 0, 128, 1, 4, 1, 4)]
        shapes += [(128, 128, 64, 64, 1, 4, 1, 8), (128, 128, 0, 64, 1, 5, 1, 8)]
        if product.gated:
            shapes += [(128, 256, 0, 64, 1, 4, 1, 8), (64, 256, 0, 64, 1, 4, 1, 4)]
    else:
        shapes = [(128, 128, 64, 64, 1, 4, 1, 8), (128, 128, 0, 64, 1, 3, 2, 4)]
        if product.gated:
            shapes += [(128, 128, 0, 64, 2, 5, 1, 4), (64, 256, 0, 64, 2, 4, 1, 4), (128, 256, 0, 64, 1, 4, 1, 8)]
            shapes += [(128, 256, 0, 64, 1, 3, 1, 8, 64)]
        else:
            shapes += [(256, 128, 0, 64, 1, 4, 1, 8)]
            shapes += [(256, 128, 0, 64, 1, 3, 1, 8, 192), (128, 128, 64, 64, 1, 4, 1, 8, 64)]
            shapes += [(128, 128, 0, 64, 2, 5, 1, 4)]
            if product.depth > 4 * 64:  # the stages are full of a program's first tile, whatever comes next
                shapes += [(128, 128, 0, 64, 2, 5, 1, 4, 0, piece) for piece in (32, 64)]
            # Where narrower tiles leave fewer multiprocessors idle. Without padding BERT-base's batches have some 2300
            # rows: to 768 columns 108 tiles of 128 are one wave, of 192 there are 72 for 132 multiprocessors; to 3072
            # columns 360 tiles of 160 are three waves, as are 288 of 192.
            if _columns_in_turn(product, 128) < _columns_in_turn(product, 192):
                shapes += [(128, 128, 0, 64, 1, 5, 1, 8)]
            if _columns_in_turn(product, 160) < _columns_in_turn(product, 192):
                shapes += [(128, 128, 32, 64, 1, 4, 1, 8), (128, 128, 32, 64, 1, 4, 1, 8, 64)]
    if product.gated:
        shapes = [shape for shape in shapes if not shape[2]]
    configs = [_config(1, m, n // product.halves, *rest) for m, n, *rest in shapes]
    return configs[: 1 if product.columns * product.depth < 1 << 16 else None]  # so small, whichever it is


def _columns_in_turn(product: Product, width: int) -> int:
    """How many columns a multiprocessor computes, one after another, in tiles of 128 rows and so many columns."""
    tiles = triton.cdiv(product.rows, 128) * triton.cdiv(product.columns, width)
    return triton.cdiv(tiles, product.target.num_sms) * width


def matmul_wgmma_rope_configs(product: Product, head_dim: int) -> list[Config]:
    """Configs of `matmul_wgmma_rope`: those of `matmul_wgmma` whose tiles hold whole heads."""
    # The last one for heads of 128 and many rows. With twice the rows of a warp group it spills.
    configs = [*matmul_wgmma_configs(product), _config(1, 128, 128, 0, 64, 1, 5, 1, 8)]
    fit = (c for c in configs if c["BLOCK_N"] % head_dim == c["MORE_N"] % head_dim == 0 and not finishes(c))
    return list(dict.fromkeys(c for c in fit if c["BLOCK_M"] <= 16 * c.num_warps))


def finishes(config: Config) -> bool:
    """Whether a team of its own finishes the tiles."""
    return "FINISH" in dict(config.blocks)


def matmul_wgmma_parts_configs(product: Product) -> list[Config]:
    """Configs of `matmul_wgmma_parts`."""
    shapes = [(64, 64, 0, 128, 1, 6, 1, 4), (64, 32, 0, 256, 1, 4, 1, 4), (64, 64, 0, 64, 1, 6, 2, 4)]
    if product.rows <= 160:
        shapes += [(64, 32, 0, 128, 1, 6, 1, 4), (64, 64, 0, 256, 1, 3, 1, 4)]
    else:
        shapes += [(64, 128, 64, 64, 1, 6, 1, 4), (64, 64, 0, 128, 1, 3, 2, 4), (128, 128, 0, 64, 1, 4, 1, 8)]
    configs = []
    for m, n, more, k, *rest in shapes:
        tiles = triton.cdiv(product.rows, m) * triton.cdiv(product.columns, n + more)
        wanted = product.target.num_sms * rest[2] / tiles  # as many as there are places for
        splits = [s for s in (1, 2, 3, 4, 6) if s <= max(1.0, 1.2 * wanted) and 2 * k * s <= product.depth]
        enough = [s for s in splits if s >= wanted / 3] or splits[-1:]
        configs += [_config(split, m, n, more, k, *rest) for split in enough]
    return configs or [_config(1, 64, 64, 0, 64, 1, 3, 1, 4)]


def _config(
    split: int, m: int, n: int, more: int, k: int, teams: int, stages: int, per_sm: int, warps: int, finish: int = 0,
    piece: int = 0,
) -> Config:  # fmt: skip
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "MORE_N": more, "BLOCK_K": k, "SPLIT_K": split}
    blocks |= {"TEAMS": teams, "STAGES": stages, "PER_SM": per_sm} | ({"FINISH": finish} if finish else {})
    blocks |= {"PIECE": piece} if piece else {}
    return Config.of(warps, 1, **blocks)
