"""The Gluon kernels on their Ops' samples and with every config, in an emulator: the numbers, without a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS, Op, Sample

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")

from burnish.kernels.launch import Launch, Target, recording
from tests.kernels.gluon_emulator import emulate

H200 = Target((9, 0), 132)
FEW_SMS = Target((9, 0), 3)  # so that programs have several tiles

CASES = [
    pytest.param(op, impl, dtype, sample, id=f"{op.name}-{impl}-{str(dtype)[6:]}-{sample.label}")
    for op in OPS.values()
    for impl in op.impls
    if impl.startswith("gluon")
    for dtype in (torch.bfloat16, torch.float16)
    for sample in op.samples("cpu", dtype)
]


def emulated(op: Op, impl: str, bound: Any, config: Any) -> Any:
    launches: list[Launch] = []
    with recording(launches.append, FEW_SMS):
        result = op.impls[impl].fn(*bound, config=config)
    for launch in launches:
        emulate(launch)
    return result


def claims(op: Op, impl: str, bound: Any) -> bool:
    return not [reason for reason in op.impls[impl].why_not(*bound) if "not on a CUDA device" not in reason]


@pytest.mark.parametrize(("op", "impl", "dtype", "sample"), CASES)
def test_samples(op: Op, impl: str, dtype: torch.dtype, sample: Sample) -> None:
    bound = op.bind(*sample.args, **sample.kwargs)
    if impl == "gluon_gate" or not claims(op, impl, bound):  # the gate's second product, torch's, would run too early
        return
    with recording(lambda launch: None, H200):
        configs = op.impls[impl].configs(*bound)  # type: ignore[misc]
    assert configs
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for config in configs:
        assert_close(emulated(op, impl, bound, config), *expected)


def test_programs_with_many_tiles() -> None:
    op = OPS["linear"]
    shapes = (300, 720), (450, 720), (450,)  # more steps over K than twice the stages of shared memory
    x, weight, bias = (randn(*shape, dtype=torch.bfloat16, seed=seed) for seed, shape in enumerate(shapes))
    bound = op.bind(x, weight / math.sqrt(720), bias, "gelu", randn(300, 450, dtype=torch.bfloat16, seed=3))
    from burnish.kernels.matmul_configs import Product
    from burnish.kernels.matmul_wgmma import matmul_wgmma_configs

    expected = op.reference(*bound), oracle(op.reference, *bound)
    for rows in (100, 300, 3000):  # the configs of each kind of product
        for config in matmul_wgmma_configs(Product(rows, 450, 720, torch.bfloat16, H200)):
            assert_close(emulated(op, "gluon", bound, config), *expected)


def test_sums_in_parts() -> None:
    op = OPS["linear_add_layer_norm"]
    x, weight = randn(200, 768, dtype=torch.float16, seed=0), randn(192, 768, dtype=torch.float16, seed=1)
    bias, residual = randn(192, dtype=torch.float16, seed=2), randn(200, 192, dtype=torch.float16, seed=3)
    bound = op.bind(x, weight / math.sqrt(768), bias, residual, bias, bias)
    with recording(lambda launch: None, H200):
        configs = op.impls["gluon"].configs(*bound)  # type: ignore[misc]
    assert max(config["SPLIT_K"] for config in configs) > 1
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for config in configs:
        assert_close(emulated(op, "gluon", bound, config), *expected)
