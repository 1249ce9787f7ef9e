"""The kernels of sampling in the interpreter, on what the Op's samples leave out; compiled at full size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import penalize_repetition, sample_token
from burnish.ops.sample_token import kept_scores

pytest.importorskip("triton")

from burnish.kernels import sample as kernels
from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, Launch, Target, recording
from tests.slow import slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Target((9, 0), 132)
CONFIGS = [Config.of(num_warps=4, CHUNK=chunk, BITS=bits) for chunk, bits in ((128, 4), (256, 6), (1024, 5))]


def logits_of(kind: str, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    x = randn(rows, size, seed=3, outliers=0.0)
    kinds = {
        "plain": x * 3,
        "far below zero": x - 1000,
        "nearly equal": x * 1e-3 + 8,
        "few values": x.round(),
        "equal": torch.full_like(x, -2.5),
        "around zero": torch.where(x > 0.5, 0.0, torch.where(x < -0.5, -0.0, x * 1e-7)),
        "mostly masked": torch.where(x > 1.5, x, -math.inf),
        "one token": torch.where(torch.arange(size) == 77, x, -math.inf),
        "masked by the lowest number": torch.where(x > 0, x, torch.finfo(dtype).min),
    }
    return kinds[kind].to(dtype)


KINDS = [
    "plain",
    "far below zero",
    "nearly equal",
    "few values",
    "equal",
    "around zero",
    "mostly masked",
    "one token",
    "masked by the lowest number",
]


def kept_by_kernel(logits: Tensor, temperature: float, top_k: int, top_p: float, config: Config) -> Tensor:
    """Which tokens are at or above what the kernels search for."""
    least = None
    if top_k:
        least = kernels._search(logits, None, None, 1.0, float(top_k), config)
    if top_p < 1:
        largest = kernels.largest_token(logits, config)
        least = kernels._search(logits, largest, least, temperature, max(top_p, 1e-30), config)
    assert least is not None
    return ordered(logits.float()) >= (least.long() & 0xFFFFFFFF)[:, None]


def ordered(x: Tensor) -> Tensor:
    """Integers from 0 to 2**32 - 1 in the numbers' order."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, *map(slow, (FP32, FP16))])
def test_exactly_the_references_tokens_are_kept(dtype: torch.dtype, kind: str) -> None:
    logits = logits_of(kind, 2, 400, dtype)
    filters = [(1.0, 20, 1.0), (0.7, 0, 0.9)]
    filters += (
        [(1.0, 1, 1.0), (1.0, 399, 1.0), (1.0, 0, 0.0), (1.3, 60, 0.5)] if kind in ("plain", "few values") else []
    )
    for i, (temperature, top_k, top_p) in enumerate(filters):
        expected = kept_scores(logits, temperature, top_k, top_p, 0.0) > -math.inf
        possible = logits > -math.inf
        found = kept_by_kernel(logits, temperature, top_k, top_p, CONFIGS[i % len(CONFIGS)])
        # The reference's sum in another order may be at the other side of top_p for one number.
        assert torch.equal(found & possible, expected), (temperature, top_k, top_p)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "filters",
    [{}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.6}],
    ids=str,
)
def test_every_config_draws_the_references_tokens(config: Config, filters: dict[str, Any]) -> None:
    logits, number = logits_of("plain", 4, 301, BF16), torch.tensor(-3)
    args = sample_token.bind(logits, number, torch.tensor(1 << 35), **filters)
    assert torch.equal(sample_token.impls["triton"].fn(*args, config=config), sample_token.reference(*args))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_first_of_equal_ones_wherever_they_are(config: Config) -> None:
    chunk = config["CHUNK"]
    places = [0, 1, chunk - 1, chunk, 2 * chunk - 1, 2 * chunk, 3 * chunk + 2, 3 * chunk + 4]
    logits = torch.full((len(places), 3 * chunk + 5), -1.0, dtype=FP16)
    for row, place in enumerate(places):
        logits[row, place:] = 2.0
        logits[row, : place // 2] = math.nan
    logits[0, 0] = 2.0
    assert kernels.largest_token(logits, config).tolist() == places


def test_counters_are_left_as_they_were() -> None:
    logits, number = logits_of("plain", 2, 300, BF16), torch.tensor(8)
    args = (logits, number, number, 1.0, 30, 1.0, 0.1)
    drawn = [kernels.sample_token(*args, config=CONFIGS[1]) for _ in range(3)]
    assert all(torch.equal(drawn[0], again) for again in drawn)
    assert not counters(logits, 2).any()


def test_draws_follow_the_distribution() -> None:
    rows, logits = 256, torch.tensor([1.0, -math.inf, 2.0, 1.5, 0.0])
    drawn = kernels.sample_token(logits.repeat(rows, 1), *[torch.tensor(1)] * 2, 1.0, 0, 1.0, 0.0)
    counts, shares = drawn.bincount(minlength=5), logits.softmax(-1) * rows
    assert float(((counts - shares).square() / shares).nan_to_num().sum()) < 16.3  # 0.1% of chi-square's, 3 free


def test_only_rows_that_are_not_dense_are_copied() -> None:
    logits, number = logits_of("plain", 2, 300, BF16), torch.tensor(8)
    wide = torch.cat([logits, logits], dim=1)[:, :300]
    assert torch.equal(kernels.largest_token(wide), kernels.largest_token(logits))
    assert launches(lambda: kernels.largest_token(wide))[0].args[0] is wide
    args = (number, number, 1.0, 30, 0.9, 0.0)
    assert torch.equal(kernels.sample_token(logits.t().contiguous().t(), *args), kernels.sample_token(wide, *args))


def launches(run: Any) -> list[Launch]:
    recorded: list[Launch] = []
    with recording(recorded.append, H200):
        run()
    return recorded


@pytest.mark.parametrize(
    ("filters", "dtype", "count"),
    [
        ((0, 1.0, 0.0), BF16, 1),
        ((50, 1.0, 0.0), BF16, 4),
        ((10**6, 1.0, 0.0), BF16, 1),
        ((0, 0.9, 0.0), BF16, 5),
        ((50, 0.9, 0.1), BF16, 8),
        ((50, 0.9, 0.1), FP16, 10),
        ((50, 0.9, 0.1), FP32, 14),
        ((0, 1.0, 0.1), FP32, 2),
    ],
)
def test_how_many_launches_it_takes(filters: tuple[int, float, float], dtype: torch.dtype, count: int) -> None:
    logits, number = torch.zeros(1, 128256, dtype=dtype), torch.tensor(0)
    assert len(launches(lambda: kernels.sample_token(logits, number, number, 1.0, *filters))) == count
    assert len(launches(lambda: kernels.largest_token(logits))) == 1


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("size", [1, 1000, 128256, 262144])
@pytest.mark.parametrize("searches", [False, True])
def test_configs_are_few_and_distinct(rows: int, size: int, searches: bool) -> None:
    configs = kernels._configs(rows, size, searches, H200)
    assert 1 <= len({str(config) for config in configs}) == len(configs) <= 4
    assert all(config["CHUNK"] % 4 == 0 and size <= 256 * config["CHUNK"] for config in configs)


def test_repeated_tokens_of_many_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = randn(2, 50), torch.randint(-5, 60, (2, 5000), generator=generator)
    tokens[0] %= 20
    for length in (0, 1, 1023, 1024, 1025, 4999, 6000):
        for start in (None, torch.tensor([3, 1024])):
            args = penalize_repetition.bind(logits, tokens, torch.tensor([length, length // 2]), 1.25, start)
            eager, true = penalize_repetition.reference(*args), oracle(penalize_repetition.reference, *args)
            assert_close(penalize_repetition.impls["triton"].fn(*args), eager, true)
