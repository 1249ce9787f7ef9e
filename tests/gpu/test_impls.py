"""Every Impl of every Op on a real device, against the oracle."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

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


ATTENTION = [
    pytest.param(*case, id=name)
    for name, *case in (
        ("BERT", (1, 12, 12, 384, 384, 64), torch.float16, False, True),
        ("BERT, short", (1, 12, 12, 128, 128, 64), torch.float16, False, True),
        ("fewer keys than teams", (2, 4, 2, 70, 40, 64), torch.bfloat16, False, False),
        ("grouped, causal", (1, 32, 8, 500, 500, 64), torch.bfloat16, True, False),
        ("grouped, causal, padded", (2, 8, 2, 200, 900, 64), torch.bfloat16, True, True),
        ("128 wide, causal", (1, 32, 8, 512, 512, 128), torch.bfloat16, True, False),
        ("128 wide, padded", (2, 6, 2, 100, 700, 128), torch.float16, False, True),
    )
]


@pytest.mark.parametrize(("sizes", "dtype", "causal", "padded"), ATTENTION)
def test_attention_in_gluon_one_after_the_other(
    sizes: tuple[int, ...], dtype: torch.dtype, causal: bool, padded: bool
) -> None:
    """With each config, also those that these sizes are not offered, in a graph, as below."""
    from burnish.kernels.attention_wgmma import attention_wgmma_configs

    op, (batch, heads, key_heads, lq, lk, d) = OPS["attention"], sizes
    shapes = (batch, lq, heads, d), (batch, lk, key_heads, d), (batch, lk, key_heads, d)
    q, k, v = (randn(*s, dtype=dtype, device="cuda", seed=i).transpose(1, 2) for i, s in enumerate(shapes))
    lengths = torch.linspace(lk * 2 // 3, 0 if batch > 1 else lk, batch, device="cuda")  # of a batch one has no token
    real = (torch.arange(lk, device="cuda") < lengths[:, None]).long() if padded else None
    _assert_repeatable(
        "attention", op.bind(q, k, v, key_padding_mask=real, is_causal=causal), attention_wgmma_configs(d, 2)
    )


@pytest.mark.parametrize("rows", [128, 384])
def test_gluon_kernels_one_after_the_other(rows: int) -> None:
    """With each config, in a graph, where a kernel starts before the one ahead of it ends: one config hung there."""
    op, (n, k) = OPS["linear_add_layer_norm"], (768, 768)
    x, weight = randn(rows, k, dtype=torch.float16, device="cuda", seed=0), randn(n, k, device="cuda", seed=1)
    bias, residual = randn(n, device="cuda", seed=2).half(), randn(rows, n, device="cuda", seed=3).half()
    bound = op.bind(x, (weight / math.sqrt(k)).half(), bias, residual, bias, bias)
    _assert_repeatable(op.name, bound, None)


def _assert_repeatable(name: str, bound: tuple[Any, ...], configs: Sequence[Any] | None) -> None:
    """Many calls in a row with each config: all those that the Op offers, unless told."""
    op, memory = OPS[name], GraphMemory()
    impl = op.impls["gluon"]
    if why_not := impl.why_not(*bound):
        pytest.skip(f"the kernel is for Hopper: {why_not[0]}")
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for config in configs or impl.configs(*bound):  # type: ignore[misc]
        impl.fn(*bound, config=config)  # compiles
        graph, outs = memory.capture(lambda config=config: [impl.fn(*bound, config=config) for _ in range(24)])
        faulthandler.dump_traceback_later(60, exit=True)  # nothing else ends a wait for a kernel that hangs
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        assert_close(outs[-1], *expected)
