"""The Ops of sampling: what they keep against Hugging Face's processors, the noise, the draws' distribution, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.numerics import randn
from burnish.op import OPS, Op
from burnish.ops import penalize_repetition, sample_token
from burnish.ops.sample_token import gumbel_noise, kept_scores, kept_scores_by_topk, philox

BF16, FP32 = torch.bfloat16, torch.float32
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.05, "temperature": 2.0},
    {"top_p": 0.0},
    {"top_p": 0.999, "temperature": 0.1},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 200, "min_p": 0.1, "temperature": 1.5},
    {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
]
IMPLS = pytest.mark.parametrize("impl", ["torch", "reference"])


def logits_of(rows: int, size: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return (randn(rows, size, seed=seed, outliers=0.0) * 2).to(dtype)


def distinct(rows: int, size: int, seed: int) -> Tensor:
    """A normal distribution's quantiles, each once, in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])
    return torch.erfinv((2 * order + 1) / size - 1) * 3


def number(value: int) -> Tensor:
    return torch.tensor(value)


def hugging_face(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """What its warpers leave, in the order in which `generate` calls them."""
    processors = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")
    scores = logits.float()  # as `generate` does
    warpers = [processors.TemperatureLogitsWarper(float(temperature))] if temperature != 1.0 else []
    warpers += [processors.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [processors.MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def in_order(filters: dict[str, Any]) -> tuple[Any, ...]:
    return tuple({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}.values())


@pytest.mark.parametrize("kept", [kept_scores, kept_scores_by_topk])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_without_ties_exactly_hugging_faces_tokens_are_kept(
    kept: Callable[..., Tensor], filters: dict[str, Any]
) -> None:
    for seed, size in enumerate((5, 300, 4001)):
        logits = distinct(16, size, seed)
        assert all(len(row.unique()) == size for row in logits)
        assert torch.equal(kept(logits, *in_order(filters)), hugging_face(logits, **filters))


@pytest.mark.parametrize("kept", [kept_scores, kept_scores_by_topk])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_with_ties_more_are_kept_only_at_top_ps_limit(kept: Callable[..., Tensor], filters: dict[str, Any]) -> None:
    for logits in (logits_of(16, 4001, BF16), logits_of(16, 300, seed=1).round(), torch.zeros(1, 40)):
        mine, theirs = kept(logits, *in_order(filters)), hugging_face(logits, **filters)
        least = theirs.masked_fill(theirs == -math.inf, math.inf).amin(-1, keepdim=True)
        scores = logits.float() / filters.get("temperature", 1.0)
        at_limit = torch.where(scores == least, scores, theirs)
        assert torch.equal(mine, at_limit if filters.get("top_p", 1.0) < 1 else theirs)


@pytest.mark.parametrize("kept", [kept_scores, kept_scores_by_topk])
def test_filters_leave_what_was_masked_before(kept: Callable[..., Tensor]) -> None:
    logits = logits_of(4, 100)
    logits[:, ::3], logits[1, 1:] = -math.inf, -math.inf
    for filters in FILTERS:
        assert torch.equal(kept(logits, *in_order(filters))[[0, 2, 3]], hugging_face(logits, **filters)[[0, 2, 3]])
    assert kept(logits, 1.0, 0, 0.9, 0.1)[1].argmax() == 0  # a row of nothing


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: Any, key: Any, words: Any) -> None:
    """Those that come with its authors' Random123."""
    assert tuple(map(int, philox([*map(number, counter)], [*map(number, key)]))) == words


def test_noise_is_gumbels() -> None:
    noise = gumbel_noise(number(0), number(0), 100, 10_001).double()
    count = noise.numel()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    below = (-noise).exp().neg().exp().flatten().sort().values  # the distribution function: uniform
    assert (below - torch.linspace(0, 1, count)).abs().max() < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, 0.1%
    assert len(noise.flatten().unique()) > 0.9 * count


@IMPLS
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(impl: str, filters: dict[str, Any]) -> None:
    rows, logits = 40_000, logits_of(1, 12, seed=3)
    args = sample_token.bind(logits.expand(rows, 12).contiguous(), number(5), number(9), **filters)
    counts = sample_token.impls[impl].fn(*args).bincount(minlength=12)
    shares = kept_scores(logits, *in_order(filters)).softmax(-1)[0] * rows
    kept = shares > 0
    assert not counts[~kept].any()
    chi_square = float(((counts - shares).square() / shares)[kept].sum())
    free = int(kept.sum()) - 1
    assert chi_square < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3  # 0.1%, Wilson and Hilferty


def test_rows_and_steps_and_seeds_differ_and_are_repeatable() -> None:
    logits = torch.zeros(8, 5000)
    drawn = {
        (seed, step): sample_token(logits, number(seed), number(step))
        for seed in (0, 1, 1 << 32, -1)
        for step in (0, 1, 1 << 32)
    }
    assert len(torch.cat(list(drawn.values())).unique()) > 90  # of 96 among 5000
    assert torch.equal(sample_token(logits, number(1), torch.tensor(1, dtype=torch.int32)), drawn[1, 1])


def test_with_a_seed_for_each_a_row_may_be_anywhere() -> None:
    logits, seeds, order = logits_of(6, 300), torch.arange(6) * 7, torch.tensor([3, 1, 5, 0, 2, 4])
    drawn = sample_token(logits, seeds, number(4), top_k=50)
    assert torch.equal(sample_token(logits[order], seeds[order], number(4), top_k=50), drawn[order])
    assert torch.equal(sample_token(logits[2:3], seeds[2:3], number(4), top_k=50), drawn[2:3])
    steps = torch.tensor([4, 4, 5, 4, 4, 9])
    assert torch.equal(sample_token(logits, seeds, steps, top_k=50)[[0, 1, 3, 4]], drawn[[0, 1, 3, 4]])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_both_choose_the_same_tokens(dtype: torch.dtype, filters: dict[str, Any]) -> None:
    logits = logits_of(200, 1500, dtype, seed=2)
    drawn, expected = (
        sample_token.impls[impl].fn(*sample_token.bind(logits, number(11), number(3), **filters))
        for impl in ("torch", "reference")
    )
    assert int((drawn != expected).sum()) <= 1  # where two sums are equal but for rounding


@IMPLS
def test_the_largest_of_ties_infinities_and_nan(impl: str) -> None:
    nan, inf = math.nan, math.inf
    rows = [[1, 3, 3, 2], [nan, 1, nan, 2], [nan, nan, nan, nan], [-inf, -inf, nan, -inf], [-inf, -inf, -inf, -5.0]]
    rows += [[0, inf, inf, nan], [-0.0, 0.0, -1, nan]]
    logits = torch.tensor(rows)
    args = sample_token.bind(logits, None, None, do_sample=False)
    assert sample_token.impls[impl].fn(*args).tolist() == [1, 3, 0, 0, 3, 1, 0]
    drawn = sample_token.bind(logits, number(0), number(0), temperature=0.1, top_k=3, top_p=0.9, min_p=0.1)
    assert sample_token.impls[impl].fn(*drawn)[1:6].tolist() == [3, 0, 0, 3, 1]


@IMPLS
@pytest.mark.parametrize("filters", [{"do_sample": False}, {}, FILTERS[-1], {"top_p": 0.9}], ids=str)
def test_nothing_waits_for_the_device(impl: str, filters: dict[str, Any]) -> None:
    """A tensor without numbers can give none."""
    with FakeTensorMode():
        args = sample_token.bind(torch.empty(3, 100), *[torch.zeros(()).long()] * 2, **filters)
        assert sample_token.impls[impl].fn(*args).shape == (3,)
        tokens, length = torch.zeros(3, 20).long(), torch.zeros(3).long()
        args = penalize_repetition.bind(torch.empty(3, 100), tokens, length, 1.1)
        assert penalize_repetition.impls[impl].fn(*args).shape == (3, 100)


@IMPLS
@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.7])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_penalties_are_hugging_faces(dtype: torch.dtype, penalty: float, impl: str) -> None:
    module = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")
    generator = torch.Generator().manual_seed(0)
    logits, tokens = logits_of(4, 60, dtype), torch.randint(60, (4, 50), generator=generator)
    run = penalize_repetition.impls[impl].fn
    for length in (0, 1, 37, 50, 99):
        theirs = module.RepetitionPenaltyLogitsProcessor(penalty)(tokens[:, :length], logits)
        assert torch.equal(run(*penalize_repetition.bind(logits, tokens, number(length), penalty)), theirs)
    start, module_start = torch.tensor([0, 7, 50, 20]), module.RepetitionPenaltyLogitsProcessor
    theirs = module_start(penalty, prompt_ignore_length=start)(tokens, logits)
    assert torch.equal(run(*penalize_repetition.bind(logits, tokens, number(50), penalty, start)), theirs)
    lengths = torch.tensor([3, 0, 50, 12])
    each = [module_start(penalty)(tokens[i : i + 1, :n], logits[i : i + 1]) for i, n in enumerate(lengths.tolist())]
    assert torch.equal(run(*penalize_repetition.bind(logits, tokens, lengths, penalty)), torch.cat(each))


SAMPLE = {"logits": torch.zeros(2, 9), "seed": number(0), "step": number(0)}
PENALIZE = {
    "logits": torch.zeros(2, 9),
    "tokens": torch.zeros(2, 3, dtype=torch.int64),
    "length": number(1),
    "penalty": 1.5,
}


@pytest.mark.parametrize(
    ("op", "changes", "error", "says"),
    [
        (sample_token, {"logits": torch.zeros(9)}, ValueError, "logits"),
        (sample_token, {"logits": torch.zeros(2, 0)}, ValueError, "vocabulary"),
        (sample_token, {"logits": torch.zeros(2, 9, dtype=torch.int64)}, TypeError, "logits"),
        (sample_token, {"seed": None}, ValueError, "seed is None"),
        (sample_token, {"step": None}, ValueError, "step is None"),
        (sample_token, {"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "one for each row"),
        (sample_token, {"seed": torch.zeros((), dtype=torch.int32)}, TypeError, "must be int64"),
        (sample_token, {"step": torch.zeros(())}, TypeError, "int32 or int64"),
        (sample_token, {"temperature": 0.0}, ValueError, "do_sample=False"),
        (sample_token, {"temperature": math.nan}, ValueError, "temperature"),
        (sample_token, {"top_k": -1}, ValueError, "top_k"),
        (sample_token, {"top_p": 1.1}, ValueError, "top_p"),
        (sample_token, {"min_p": -0.1}, ValueError, "min_p"),
        (penalize_repetition, {"logits": torch.zeros(9)}, ValueError, "logits"),
        (penalize_repetition, {"logits": torch.zeros(2, 9).long()}, TypeError, "logits"),
        (penalize_repetition, {"tokens": torch.zeros(3, 3).long()}, ValueError, "tokens"),
        (penalize_repetition, {"tokens": torch.zeros(2, 3)}, TypeError, "tokens"),
        (penalize_repetition, {"length": torch.zeros(3).long()}, ValueError, "length"),
        (penalize_repetition, {"start": torch.zeros(2, 2).long()}, ValueError, "start"),
        (penalize_repetition, {"penalty": 0.0}, ValueError, "penalty"),
    ],
)
def test_wrong_inputs_are_named(op: Op, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    given = (SAMPLE if op is sample_token else PENALIZE) | changes
    with pytest.raises(error, match=says):
        OPS[op.name](**given)


def test_the_triton_impl_says_which_vocabulary_is_too_large() -> None:
    reasons = sample_token.impls["triton"].why_not(torch.zeros(1, (1 << 18) + 1), None, None, do_sample=False)
    assert any("262145 is above 262144" in reason for reason in reasons)
