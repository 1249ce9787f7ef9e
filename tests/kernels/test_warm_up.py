"""Which launches count as one kernel when many are compiled at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from burnish.numerics import randn

pytest.importorskip("triton")

from burnish.kernels import warm_up
from burnish.kernels.launch import Launch, Target, recording
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_configs


def launch_of(rows: int, dtype: torch.dtype, config: int) -> Launch:
    x, weight = randn(rows, 64, dtype=dtype), randn(192, 64, dtype=dtype)
    launches: list[Launch] = []
    with recording(launches.append, Target((9, 0), 132)):
        product = Product(rows, 4096, 4096, dtype, Target((9, 0), 132))
        matmul_wgmma(x, weight, config=matmul_wgmma_configs(product)[config])
    return launches[0]


def test_launches_of_one_kernel_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (launch_of(100, torch.bfloat16, 0) for _ in range(2))
    others = [launch_of(100, torch.float16, 0), launch_of(100, torch.bfloat16, 1)]

    def read(self: torch.Tensor, **_: Any) -> str:
        raise AssertionError("the entries were read: on a GPU that takes a tenth of a second")

    monkeypatch.setattr(torch.Tensor, "__repr__", read)
    key = warm_up._key(first)
    assert warm_up._key(again) == key
    assert key not in [warm_up._key(other) for other in others]


def test_kernels_are_loaded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first launch would build a launcher with the C compiler, one after the other."""
    loaded: list[object] = []

    class Compiled:
        def _init_handles(self) -> None:
            loaded.append(self)

    class Kernel:
        def warmup(self, *args: Any, **options: Any) -> Compiled:
            return Compiled()

    kernel = Kernel()
    launches = [replace(launch_of(100, torch.bfloat16, config), kernel=kernel) for config in (0, 0, 1)]

    @contextmanager
    def replaying(record: Callable[[Launch], None]) -> Iterator[None]:
        yield
        for launch in launches:
            record(launch)

    monkeypatch.setattr(warm_up, "recording", replaying)
    warm_up.warm_up([])
    assert len(loaded) == 2
