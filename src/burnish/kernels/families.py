"""The kinds of kernels that multiply, by name: each with its launcher and the configs that it offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from burnish.kernels.gemv import gemv, gemv_configs
from burnish.kernels.gemv_mma import gemv_mma, gemv_mma_configs
from burnish.kernels.launch import Config
from burnish.kernels.matmul import matmul
from burnish.kernels.matmul_configs import Product, matmul_configs
from burnish.kernels.matmul_tma import matmul_tma, matmul_tma_configs
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_configs
from burnish.kernels.skinny import skinny, skinny_configs


@dataclass(frozen=True)
class Family:
    """One kind of kernel: its launcher and the configs that it offers."""

    multiply: Callable[..., Tensor]
    configs: Callable[[Product], list[Config]]


FAMILIES = {
    "matmul": Family(matmul, matmul_configs),
    "gemv": Family(gemv, gemv_configs),
    "gemv_mma": Family(gemv_mma, gemv_mma_configs),
    "skinny": Family(skinny, skinny_configs),
    "tma": Family(matmul_tma, matmul_tma_configs),
    "wgmma": Family(matmul_wgmma, matmul_wgmma_configs),
}
