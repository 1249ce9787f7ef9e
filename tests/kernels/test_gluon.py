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

from burnish.kernels import attention_wgmma
from burnish.kernels.launch import Config, Launch, Target, recording
from burnish.kernels.linear_gelu_wgmma import linear_gelu_wgmma_configs
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma import matmul_wgmma
from burnish.kernels.matmul_wgmma_configs import finishes, matmul_wgmma_configs
from burnish.ops._activations import activate
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
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for rows in (100, 300, 3000):  # the configs of each kind of product
        for config in matmul_wgmma_configs(Product(rows, 450, 720, torch.bfloat16, H200)):
            assert_close(emulated(op, "gluon", bound, config), *expected)


# Rows, columns and depth of products whose tiles a team of its own finishes, by three programs: with several tiles
# each, of which some hang over; with fewer tiles than programs; with whole tiles; with few steps over K, or one.
FINISHED = [
    ((1100, 450, 720), "gelu", True, True),
    ((900, 700, 136), "silu", True, False),
    ((200, 100, 720), "gelu_tanh", False, True),
    ((257, 40, 72), "relu", True, True),
    ((768, 384, 256), "none", False, False),
    ((1500, 130, 64), "tanh", True, False),
]


@pytest.mark.parametrize(("sizes", "activation", "biased", "added"), FINISHED, ids=[str(case[0]) for case in FINISHED])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_finished_by_a_team_of_its_own(
    sizes: tuple[int, int, int], activation: str, biased: bool, added: bool, gated: bool
) -> None:
    (rows, columns, depth), dtype = sizes, torch.float16
    height = columns * (2 if gated else 1)
    x = randn(rows, depth, dtype=dtype, seed=0)
    weight = randn(height, depth, dtype=dtype, seed=1) / math.sqrt(depth)
    bias = randn(height, dtype=dtype, seed=2) if biased else None
    residual = randn(rows, columns, dtype=dtype, seed=3) if added else None
    configs = [c for c in matmul_wgmma_configs(Product(4096, 4096, 768, dtype, H200, gated)) if finishes(c)]
    assert configs

    def reference(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        product = torch.nn.functional.linear(x, weight, bias)
        gate, up = product.chunk(2, -1) if gated else (product, None)
        result = activate(gate, activation) if up is None else activate(gate, activation) * up
        return result if residual is None else result + residual

    inputs = x, weight, bias, residual
    expected = reference(*inputs), oracle(reference, *inputs)
    for config in configs:
        launches: list[Launch] = []
        with recording(launches.append, FEW_SMS):
            out = matmul_wgmma(x, weight, bias, activation, residual, gated, config)
        emulate(launches[0])
        assert_close(out, *expected)


# Rows, columns and depth: with several tiles each, of which some hang over; fewer tiles than programs; whole tiles, and
# one step over K; more steps than twice the stages of shared memory.
AROUND_GELU = [(1100, 456, 136), (200, 104, 72), (768, 384, 64), (300, 456, 720)]


@pytest.mark.parametrize(("rows", "columns", "depth"), AROUND_GELU)
def test_products_around_gelu(rows: int, columns: int, depth: int) -> None:
    dtype = torch.bfloat16
    grad, x = randn(rows, depth, dtype=dtype, seed=0), randn(rows, columns, dtype=dtype, seed=1)
    weight = randn(depth, columns, dtype=dtype, seed=2) / math.sqrt(depth)
    for name, args in (
        ("linear_gelu_backward", (grad, weight, x)),
        ("linear_with_preactivation", (grad, weight.t().contiguous(), x[0].clone())),
    ):
        op = OPS[name]
        bound = op.bind(*args)
        expected = op.reference(*bound), oracle(op.reference, *bound)
        configs = linear_gelu_wgmma_configs(3072 * 768, backward=name == "linear_gelu_backward")
        assert len(configs) == 2
        for config in configs:
            assert_close(emulated(op, "gluon", bound, config), *expected)


@pytest.mark.slow
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
        normed, total = emulated(op, "gluon", bound, config)
        assert_close((normed, total), *expected)
    same, nothing = emulated(op, "gluon", (*bound[:-1], False), configs[-1])
    assert torch.equal(same, normed), "the sum is rounded before it is normalized, kept or not"
    assert nothing.shape == (0,)


def attention_inputs(queries: int = 64, head_dim: int = 64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(1, 2, rows, head_dim, dtype=torch.bfloat16) for rows in (queries, 64, 64))


@pytest.mark.parametrize("heads_at_once", [1, 2, 4, 5, 6, 100])
def test_attention_in_groups_of_heads(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["attention"]
    q, k, v = (randn(2, heads, 150, 64, dtype=torch.bfloat16, seed=i) for i, heads in enumerate((6, 3, 3)))
    bound = op.bind(q, k, v, is_causal=True)
    expected = op.reference(*bound), oracle(op.reference, *bound)
    keys_of_a_head = 2 * 150 * 64 * 2 // 2  # two query heads share them
    monkeypatch.setattr(attention_wgmma, "_IN_CACHE", heads_at_once * keys_of_a_head)
    for config in attention_wgmma.attention_wgmma_configs(64):
        assert_close(emulated(op, "gluon", bound, config), *expected)


def configs_that_share(head_dim: int) -> list[Config]:
    configs = attention_wgmma.attention_wgmma_configs(head_dim, 2)
    return [config for config in configs if config["SPLIT"] > 1]


# By teams that share queries: blocks of keys, of 64 or 128, that are fewer than these, not the same number for each, or
# more than there are stages; queries that see no key at all, or none of a team's; and blocks of queries that hang over.
SHARED = [
    ("one key", (1, 2, 2, 40, 1), False, None),
    ("one block", (2, 2, 1, 100, 40), False, None),
    ("last block is short", (1, 2, 1, 64, 150), False, None),
    ("more blocks than stages", (1, 1, 1, 70, 900), False, None),
    ("causal, more blocks than stages", (1, 2, 1, 130, 900), True, None),
    ("causal, as many keys", (2, 6, 3, 200, 200), True, None),
    ("causal, queries before the first key", (1, 2, 2, 200, 70), True, None),
    ("padding from some key on", (3, 2, 1, 90, 300), False, "right"),
    ("padding up to some key", (3, 2, 2, 64, 300), False, "left"),
    ("padding up to some key, causal", (3, 2, 1, 300, 300), True, "left"),
    ("no real token", (2, 1, 1, 64, 200), False, "all"),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("sizes", "causal", "padded"), [case[1:] for case in SHARED], ids=[case[0] for case in SHARED])
def test_attention_by_teams_that_share_queries(
    sizes: tuple[int, ...], causal: bool, padded: str | None, head_dim: int
) -> None:
    op = OPS["attention"]
    batch, heads, key_heads, lq, lk = sizes
    shapes = (batch, lq, heads, head_dim), (batch, lk, key_heads, head_dim), (batch, lk, key_heads, head_dim)
    q, k, v = (randn(*shape, dtype=torch.bfloat16, seed=i).transpose(1, 2) for i, shape in enumerate(shapes))
    real = None
    if padded is not None:
        lengths = torch.linspace(0, lk, batch).long() if padded != "all" else torch.zeros(batch, dtype=torch.int64)
        real = torch.arange(lk) < lengths[:, None]
        real = real.flip(1) if padded == "left" else real
    bound = op.bind(q, k, v, key_padding_mask=real, is_causal=causal)
    expected = op.reference(*bound), oracle(op.reference, *bound)
    for config in configs_that_share(head_dim):
        assert_close(emulated(op, "gluon", bound, config), *expected)


def test_teams_share_queries_where_there_are_few() -> None:
    def most(batch: int, heads: int, lq: int, lk: int) -> int:
        q, k = (torch.empty(batch, heads, rows, 64, dtype=torch.bfloat16) for rows in (lq, lk))
        with recording(lambda launch: None, H200):
            return attention_wgmma.useful_split(q, k)

    assert most(1, 12, 384, 384) == 2
    assert most(1, 12, 64, 64) == 1, "one block of keys"
    assert [most(1, heads, 64, 512) for heads in (263, 264)] == [2, 1], "two programs for each of 132 multiprocessors"
    for head_dim in (64, 128):
        alone, by_two = (attention_wgmma.attention_wgmma_configs(head_dim, n) for n in (1, 2))
        assert {config["SPLIT"] for config in alone} == {1}
        assert set(alone) < set(by_two)


WIDE = torch.zeros(1, 2, 64, 65, dtype=torch.bfloat16)[..., :64]  # rows of 130 bytes
REFUSED = [
    (attention_inputs(queries=32), {}, "q has 32 queries; the kernel takes 33 and more"),
    (attention_inputs(head_dim=32), {}, "head_dim is 32, of v 32"),
    ((*attention_inputs()[:2], torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)), {}, "head_dim is 64, of v 128"),
    (attention_inputs(), {"scale": 0.0}, "scale is 0.0; it must be positive"),
    (attention_inputs(), {"bias": torch.zeros(64, 64)}, "the kernel takes no bias"),
    (attention_inputs(), {"window": 8}, "the kernel takes no window"),
    (tuple(x.float() for x in attention_inputs()), {}, "q is torch.float32, not a half-precision type"),
    ((attention_inputs()[0], WIDE, attention_inputs()[2]), {}, "k has strides"),
    ((attention_inputs()[0], *(x[:, :, :0] for x in attention_inputs()[1:])), {}, "k or v is empty"),
]


@pytest.mark.parametrize(("tensors", "arguments", "reason"), REFUSED)
def test_attention_refuses(tensors: tuple[torch.Tensor, ...], arguments: dict[str, Any], reason: str) -> None:
    op = OPS["attention"]
    assert claims(op, "gluon", op.bind(*attention_inputs(queries=33)))
    reasons = op.impls["gluon"].why_not(*op.bind(*tensors, **arguments))
    assert any(reason in stated for stated in reasons), reasons
