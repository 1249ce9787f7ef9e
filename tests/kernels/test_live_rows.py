"""Kernels that are told on the device how many rows are wanted: right up to there, whatever the others hold, and, where
they promise it, nothing written beyond."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS

import burnish.ops  # noqa: F401 isort: skip

pytest.importorskip("triton")

from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.matmul import matmul
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_tma import matmul_tma
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import finishes, matmul_wgmma_configs
from burnish.kernels.varlen_attention import varlen_attention_forward
from tests.kernels.gluon_emulator import emulate

FP16 = torch.float16
H200, FEW_SMS = Target((9, 0), 132), Target((9, 0), 3)
ROWS = 75
LIVE = [0, 1, 37, 64, ROWS]


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the `with`, fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def count(live: int) -> Tensor:
    return torch.tensor([live], dtype=torch.int32)


def rows(*shape: int, live: int, seed: int, beyond: float = math.nan) -> Tensor:
    x = randn(*shape, dtype=FP16, seed=seed)
    x.view(-1, shape[-1])[live:] = beyond
    return x


def cut(args: tuple[Any, ...], live: int) -> tuple[Any, ...]:
    """The first rows of what has so many."""
    return tuple(a[:, :live] if isinstance(a, Tensor) and a.shape[:2] == (1, ROWS) else a for a in args)


def assert_live(result: Any, live: int, reference: Callable[..., Any], args: tuple[Any, ...], untouched: bool) -> None:
    results = result if isinstance(result, tuple) else (result,)
    if untouched:
        assert all(r.view(-1, r.shape[-1])[live:].isnan().all() for r in results if r.numel())
    if live:
        short = cut(args, live)
        found = tuple(r[:, :live] if r.numel() else r for r in results)
        assert_close(found if len(found) > 1 else found[0], reference(*short), oracle(reference, *short))


def arguments(name: str, live: int, beyond: float) -> tuple[Any, ...]:
    vector = randn(96, dtype=FP16, seed=9)
    x, residual = (rows(1, ROWS, 96, live=live, seed=seed, beyond=beyond) for seed in (0, 1))
    ids = torch.randint(50, (1, ROWS), generator=torch.Generator().manual_seed(2))
    tables = [randn(50, 96, dtype=FP16, seed=seed) for seed in (3, 4, 5)]
    weight = randn(96, 96, dtype=FP16, seed=6) / math.sqrt(96)
    given: dict[str, tuple[Any, ...]] = {
        "layer_norm": (x, vector, vector),
        "rms_norm": (x, vector),
        "add_layer_norm": (x, residual, vector, vector),
        "add_rms_norm": (x, residual, vector),
        "embedding": (ids, tables[0], ids, tables[1]),
        "embedding_layer_norm": (ids, tables[0], ids, tables[1], ids, tables[2], vector, vector),
        "linear_add_layer_norm": (x, weight, vector, residual, vector, vector),
        "linear": (x, weight, vector, "gelu", residual),
    }
    return OPS[name].bind(*given[name])


TOLD = [
    (name, impl)
    for name, op in OPS.items()
    for impl, found in op.impls.items()
    if found.live_rows and not impl.startswith("gluon")
]


def test_impls_that_are_told() -> None:
    assert {name for name, op in OPS.items() if any(i.live_rows for i in op.impls.values())} == {n for n, _ in TOLD}
    assert {"linear", "linear_add_layer_norm", "layer_norm", "add_layer_norm"} <= {n for n, _ in TOLD}


@pytest.mark.parametrize(
    "beyond", [math.nan, 1.0]
)  # what is written there would be seen with the one, read by the other
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(("name", "impl"), TOLD)
def test_impls(name: str, impl: str, live: int, beyond: float) -> None:
    op, args = OPS[name], arguments(name, live, beyond)
    with poisoned():
        result = op.impls[impl].fn(*args, live_rows=count(live))
    assert_live(result, live, op.reference, args, untouched=name != "linear")


NORMS = [
    Config.of(num_warps=4, ROWS=4, PER_SM=0),
    Config.of(num_warps=4, num_stages=2, ROWS=1, PER_SM=2),
    Config.of(num_warps=4, num_stages=3, ROWS=2, PER_SM=1),
]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("config", NORMS, ids=str)
def test_norms_of_several_rows_at_once(config: Config, live: int) -> None:
    op, args = OPS["add_layer_norm"], arguments("add_layer_norm", live, 1.0)
    with poisoned():
        result = op.impls["triton"].fn(*args, config=config, live_rows=count(live))
    assert_live(result, live, op.reference, args, untouched=True)


PRODUCTS = {
    "split": (matmul, Config.of(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, GROUP_M=2, SPLIT_K=3)),
    "tma": (
        matmul_tma,
        Config.of(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, GROUP_M=2, HALVES=1, FLATTEN=1, num_warps=4, num_stages=2),
    ),
}


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, live: int) -> None:
    (multiply, config), args = PRODUCTS[name], arguments("linear", live, math.nan)
    for _ in range(2):  # the counters of parts are as the next launch wants them
        with poisoned():
            result = multiply(*args, config=config, live_rows=count(live))
        assert_live(result, live, OPS["linear"].reference, args, untouched=False)
    args = arguments("linear", live, 1.0)
    with poisoned():
        result = multiply(*args, config=config, live_rows=count(live))
    whole = -(-live // config["BLOCK_M"]) * config["BLOCK_M"]
    assert result[:, whole:].isnan().all(), "tiles of which no row is wanted are left alone"


# Rows, columns and depth: several tiles for each of three programs; fewer steps over K than stages; whole tiles.
SIZES = [(600, 450, 720), (300, 130, 64), (512, 384, 256)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("share", [0, 1, 0.3, 0.75, "all"])
def test_gluon_products(sizes: tuple[int, int, int], share: Any) -> None:
    """Of every kind of config; a program of which no tile is wanted ends, and waits for the copies it asked for."""
    number, columns, depth = sizes
    live = {0: 0, 1: 1, "all": number}.get(share, int(number * share) if share != "all" else number)
    x, residual = (rows(1, number, n, live=live, seed=seed) for seed, n in enumerate((depth, columns)))
    weight = randn(columns, depth, dtype=FP16, seed=2) / math.sqrt(depth)
    bias = randn(columns, dtype=FP16, seed=3)
    args = OPS["linear"].bind(x, weight, bias, "gelu", residual)
    every = [c for n in (600, 4096) for c in matmul_wgmma_configs(Product(n, 4096, 768, FP16, H200))]
    finishing = [c for c in every if finishes(c)]
    for config in [every[0], every[-1], *finishing[:2]]:
        launches: list[Launch] = []
        with recording(launches.append, FEW_SMS):
            out = matmul_wgmma(*args, config=config, live_rows=count(live))
        out.fill_(7.0)
        emulate(launches[0])
        assert (out[:, live:] == 7.0).all()
        if live:
            short = (x[:, :live], weight, bias, "gelu", residual[:, :live])
            assert_close(out[:, :live], OPS["linear"].reference(*short), oracle(OPS["linear"].reference, *short))


@pytest.mark.parametrize("live", [0, 1, 130, 200])
def test_gluon_products_in_parts(live: int) -> None:
    """Parts lie as far apart as all rows."""
    op, vector = OPS["linear_add_layer_norm"], randn(192, dtype=FP16, seed=3)
    x, residual = (rows(1, 200, n, live=live, seed=seed) for seed, n in enumerate((768, 192)))
    weight = randn(192, 768, dtype=FP16, seed=2) / math.sqrt(768)
    args = op.bind(x, weight, vector, residual, vector, vector)
    with recording(lambda launch: None, H200):
        configs = op.impls["gluon"].configs(*args)  # type: ignore[misc]
    for config in [c for c in configs if c["SPLIT_K"] > 1][:3]:
        launches: list[Launch] = []
        with recording(launches.append, FEW_SMS):
            results = op.impls["gluon"].fn(*args, config=config, live_rows=count(live))
        for result in results:
            result.fill_(7.0)
        for launch in launches:
            emulate(launch)
        assert all((result[:, live:] == 7.0).all() for result in results)
        if live:
            short = (x[:, :live], weight, vector, residual[:, :live], vector, vector)
            assert_close(tuple(r[:, :live] for r in results), op.reference(*short), oracle(op.reference, *short))


@pytest.mark.parametrize("lengths", [(5, 33, 0, 1, 17), (0, 0), (70,), (1, 0)])
def test_attention_leaves_tokens_over(lengths: tuple[int, ...]) -> None:
    """No program is for them, and no other looks at them: not into the rest of a block of keys either."""
    live = sum(lengths)
    q, k, v = (rows(1, ROWS, 4 * 32, live=live, seed=seed).view(ROWS, 4, 32) for seed in range(3))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with poisoned():
        out, _ = varlen_attention_forward(q, k, v, offsets, None, 70, False, None, None)
    assert out[live:].isnan().all()
    if live:
        op = OPS["varlen_attention"]
        args = (q[:live], k[:live], v[:live], offsets, None, 70, 70)
        assert_close(out[:live], op.reference(*args), oracle(op.reference, *args))
    whole = OPS["varlen_attention"].reference(q, k, v, offsets)
    assert torch.equal(whole[:live], OPS["varlen_attention"].reference(q[:live], k[:live], v[:live], offsets))
