"""Product, addition and norm in one kernel whose programs wait for each other, on a GPU."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS
from burnish.runtime.cuda_graph import GraphMemory

import burnish.ops  # noqa: F401 isort: skip

pytestmark = pytest.mark.gpu

OP = OPS["linear_add_layer_norm"]
HALF = torch.float16


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    faulthandler.dump_traceback_later(90, exit=True)  # nothing else ends a wait for a kernel that hangs
    yield
    faulthandler.cancel_dump_traceback_later()


def bound(rows: int, columns: int, depth: int) -> tuple[Any, ...]:
    x, residual = (randn(1, rows, n, dtype=HALF, device="cuda", seed=i) for i, n in enumerate((depth, columns)))
    weight = (randn(columns, depth, seed=2) / math.sqrt(depth)).to("cuda", HALF)
    vectors = [randn(columns, dtype=HALF, device="cuda", seed=seed) for seed in (3, 4, 5)]
    return OP.bind(x, weight, vectors[0], residual, *vectors[1:])


def chain(args: tuple[Any, ...], config: Any, calls: int = 30) -> Tensor:
    """Kernels one after the other, each of which adds to what the one before it normalized."""
    x, weight, bias, residual, *norm = args
    for _ in range(calls):
        residual, _total = OP.impls["gluon_fused"].fn(x, weight, bias, residual, *norm, config=config)
    return residual


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(4096, 768, 768), (300, 768, 3072), (5000, 1024, 256), (900, 4096, 512)]
)
def test_each_config_gives_the_same_bits_in_and_out_of_graphs(rows: int, columns: int, depth: int) -> None:
    args = bound(rows, columns, depth)
    expected = OP.reference(*args), oracle(OP.reference, *args)
    configs = OP.impls["gluon_fused"].configs
    assert configs is not None
    for config in configs(*args):
        assert_close(OP.impls["gluon_fused"].fn(*args, config=config), *expected)
        eager = chain(args, config)
        graph, out = GraphMemory().capture(partial(chain, args, config))
        for _ in range(5):
            out.zero_()
            graph.replay()
            assert torch.equal(out, eager), config
        whole = torch.cuda.CUDAGraph()
        with torch.cuda.graph(whole):  # captured by somebody else
            theirs = chain(args, config)
        whole.replay()
        assert torch.equal(theirs, eager), config


def test_graphs_of_two_models_at_once() -> None:
    """On streams of their own, and beside launches without a graph: none counts with another's numbers."""
    all_args = [bound(2100, 768, 768), bound(1300, 768, 1536)]
    expected = [chain(args, None) for args in all_args]
    captured = [GraphMemory().capture(partial(chain, args, None)) for args in all_args]
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        assert torch.equal(chain(all_args[0], None), expected[0])
        torch.cuda.synchronize()
        for (_, out), right in zip(captured, expected, strict=True):
            assert torch.equal(out, right)
