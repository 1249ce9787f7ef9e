"""Every Impl of every Op on a real device, against the oracle."""

from __future__ import annotations

import faulthandler
import math
from functools import partial

import pytest
import torch

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS, Op, Sample
from burnish.runtime.cuda_graph import GraphMemory
from tests.ops.matrix import DTYPES, assert_impls

import burnish.ops  # noqa: F401 isort: skip

pytestmark = pytest.mark.gpu

CASES = [
    pytest.param(op, dtype, sample, id=f"{op.name}-{str(dtype)[6:]}-{sample.label}")
    for op in OPS.values()
    for dtype in DTYPES
    for sample in op.samples("cpu", dtype)
]


@pytest.mark.parametrize(("op", "dtype", "sample"), CASES)
def test_samples(op: Op, dtype: torch.dtype, sample: Sample) -> None:
    on_device = next(s for s in op.samples("cuda", dtype) if s.label == sample.label)
    # In float32 products are exact and slow, and have few configs.
    assert_impls(op, *on_device.args, every_config=dtype != torch.float32, **on_device.kwargs)


def test_one_graph_serves_every_length_of_a_cache() -> None:
    op = OPS["cached_attention"]
    shapes = ((2, 8, 1, 64), (2, 2, 500, 64), (2, 2, 500, 64))
    q, k, v = (randn(*shape, dtype=torch.bfloat16, device="cuda", seed=seed) for seed, shape in enumerate(shapes))
    lengths, memory = torch.tensor([1], device="cuda"), GraphMemory()
    for config in op.impls["triton"].configs(*op.bind(q, k, v, lengths)):  # type: ignore[misc]
        graph, out = memory.capture(partial(op.impls["triton"].fn, *op.bind(q, k, v, lengths), config=config))
        for length in (1, 63, 64, 65, 499, 500, 17):
            lengths.fill_(length)
            graph.replay()
            bound = op.bind(q, k, v, lengths)
            assert_close(out, op.reference(*bound), oracle(op.reference, *bound))


@pytest.mark.parametrize("rows", [128, 384])
def test_gluon_kernels_one_after_the_other(rows: int) -> None:
    """With each config, in a graph, where a kernel starts before the one ahead of it ends: one config hung there."""
    op, (n, k) = OPS["linear_add_layer_norm"], (768, 768)
    x, weight = randn(rows, k, dtype=torch.float16, device="cuda", seed=0), randn(n, k, device="cuda", seed=1)
    bias, residual = randn(n, device="cuda", seed=2).half(), randn(rows, n, device="cuda", seed=3).half()
    bound = op.bind(x, (weight / math.sqrt(k)).half(), bias, residual, bias, bias)
    impl, memory = op.impls["gluon"], GraphMemory()
    if why_not := impl.why_not(*bound):
        pytest.skip(f"the kernel is for Hopper: {why_not[0]}")
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for config in impl.configs(*bound):  # type: ignore[misc]
        impl.fn(*bound, config=config)  # compiles
        graph, outs = memory.capture(lambda config=config: [impl.fn(*bound, config=config) for _ in range(24)])
        faulthandler.dump_traceback_later(60, exit=True)  # nothing else ends a wait for a kernel that hangs
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        assert_close(outs[-1], *expected)
