"""The next token of each row of logits: the largest, or drawn by temperature, top-k, top-p and min-p, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, nbytes, wide
from burnish.ops._triton import triton_why_not

_MAX_VOCABULARY = 1 << 18  # of the Triton kernels
_WORD = 0xFFFFFFFF


def _check(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (batch, vocabulary)")
    for name, number, dtypes in (("seed", seed, (torch.int64,)), ("step", step, (torch.int32, torch.int64))):
        if number is None:
            if do_sample:
                raise ValueError(f"{name} is None; a draw needs one (without do_sample it does not)")
            continue
        if number.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {number.dtype}; it must be {' or '.join(str(d)[6:] for d in dtypes)}")
        if number.dim() > 1 or number.numel() not in (1, logits.shape[0]):
            raise ValueError(f"{name} has shape {tuple(number.shape)}; it must be one number, or one for each row")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; it must be above 0 (the largest logit is do_sample=False)")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be a count, or 0 to keep all")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; it must be between 0 and 1")


def _cost(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> Cost:
    # A comparison each; to draw, also a scaling, the noise's logarithms and its sum.
    return Cost((5 if do_sample else 1) * logits.numel(), nbytes(logits) + 8 * logits.shape[0])


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def drawn(rows: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = randn(rows, size, dtype=dtype, device=device, seed=seed, outliers=0.0)
        return logits * 2, number(1234 + seed), number(7)

    def number(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values if len(values) > 1 else values[0], device=device, dtype=dtype)

    every = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
    greedy = {"do_sample": False}
    yield Sample("1x3000 every filter", drawn(1, 3000, 0), every)
    yield Sample("1x128256 greedy", (randn(1, 128256, dtype=dtype, device=device), None, None), greedy)
    yield Sample("2x20000", drawn(2, 20000, 2))
    yield Sample("odd", drawn(5, 1001, 3), {"temperature": 1.3})
    yield Sample("one token", drawn(2, 1, 4), every)
    yield Sample("top_k", drawn(2, 3000, 5), {"top_k": 20})
    yield Sample("top_k beyond all", drawn(2, 300, 6), {"top_k": 1000})
    yield Sample("top_p", drawn(2, 3000, 7), {"top_p": 0.9, "temperature": 0.7})
    yield Sample("top_p of nothing", drawn(2, 3000, 8), {"top_p": 0.0})
    yield Sample("min_p", drawn(3, 3000, 9), {"min_p": 0.1})
    logits, *_ = drawn(4, 3000, 10)
    seeds = number(-5, 1 << 40, 0, 99)
    yield Sample("seed for each", (logits, seeds, number(3, dtype=torch.int32)), {"top_k": 100, "top_p": 0.95})
    yield Sample("step for each", (logits, number(-1), number(1, 1 << 33, 5, -2)))
    yield Sample("transposed", (logits.t().contiguous().t(), number(1), number(2)), {"top_k": 9})
    infinite = logits.clone()
    infinite[0, ::3], infinite[1], infinite[2:, 70] = -math.inf, -math.inf, math.inf
    yield Sample("infinities", (infinite, number(3), number(4)), every)
    yield Sample("infinities, greedy", (infinite, None, None), greedy)
    yield Sample("ties", (logits.round(), number(5), number(6)), {"top_k": 30, "top_p": 0.5})
    yield Sample("ties, greedy", (logits.round(), None, None), greedy)


def _shape(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def sample_token(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    do_sample: bool = True,
) -> Tensor:
    """The next token of each row: the largest logit's, or one drawn from what temperature, top-k, top-p and min-p keep.

    Shapes: logits (B, V). seed and step are one number each, or (B,), on the logits' device; only without do_sample may
    they be None. The result is (B,).
    Filters: Hugging Face's, in their order: the logits / temperature; those at least the top_k-th largest (0: all);
    the smallest set of the most probable that has top_p of the probability (1: all); those at least min_p times as
    probable as the first (0: all). The most probable always stays. Equal logits stay or go together; of those at
    top_p's limit Hugging Face keeps only some, as its sort leaves them.
    The draw: the largest of scores + Gumbel noise, whose bits are Philox 4x32-10's: word v % 4 for the token v of the
    key seed and the counter (v // 4, step's low word, its high word, row). The row counts where one seed serves all;
    with a seed for each, a row's draws do not depend on where in the batch it is. The same arguments give the same
    token; two Impls choose another one only where two sums, or a probability and its limit, are equal but for rounding.
    Ties: the first. NaN counts as -infinity. A row without another logit gives token 0; +infinity wins, the first.
    Dtypes: logits floating; computed in float32 (float64 for float64), the noise's bits in integers. seed int64; step
    int32 or int64; the result int64, which has no gradient.
    Errors: ValueError for shapes, for a missing seed or step, and for numbers out of range; TypeError for dtypes.
    Source: top-p is Holtzman et al., arXiv:1904.09751; min-p Nguyen et al., arXiv:2407.01082; the noise Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3" (2011), and Gumbel, "Statistical theory of extreme values" (1954).
    """
    if not do_sample:
        return _clean(logits).argmax(dim=-1)
    return _draw(kept_scores(logits, temperature, top_k, top_p, min_p), seed, step)


def kept_scores(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The logits / temperature, (B, V), with -infinity in place of those that the filters drop."""
    scores = _scores(logits, temperature)
    if top_k > 0:
        scores = _drop_below(scores, scores.topk(min(top_k, scores.shape[1])).values[:, -1:])
    if top_p < 1:
        ordered = scores.sort(dim=-1).values
        gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        gone = gone & (torch.arange(gone.shape[1], device=gone.device) < gone.shape[1] - 1)
        scores = _drop_below(scores, ordered.masked_fill(gone, torch.inf).amin(dim=-1, keepdim=True))
    if min_p > 0:
        shares = scores.softmax(dim=-1)
        scores = scores.masked_fill(shares < min_p * shares.amax(dim=-1, keepdim=True), -torch.inf)
    return scores


def _clean(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isnan(), -torch.inf)


def _scores(logits: Tensor, temperature: float) -> Tensor:
    dtype = wide(logits.dtype)
    return (_clean(logits).to(dtype) / temperature).clamp(max=torch.finfo(dtype).max)  # infinity less itself is NaN


def _drop_below(scores: Tensor, least: Tensor) -> Tensor:
    return scores.masked_fill(scores < least, -torch.inf)


def _draw(scores: Tensor, seed: Tensor | None, step: Tensor | None) -> Tensor:
    assert seed is not None
    assert step is not None
    return (scores + gumbel_noise(seed, step, *scores.shape)).argmax(dim=-1)


def gumbel_noise(seed: Tensor, step: Tensor, rows: int, size: int) -> Tensor:
    """The noise (rows, size) in float32, between -2.9 and 22.9: -log of an exponential variable.

    That is -log(1 - u), and the largest noise has the smallest u, where floats lie densest: no two of the tokens that
    may win are equal for want of digits, as they would be with u near 1.
    """
    quads = torch.arange(-(-size // 4), device=seed.device)
    row = torch.arange(rows, device=seed.device) if seed.numel() == 1 else quads.new_zeros(rows)
    (low, high), key = ([(n.reshape(-1, 1).long() >> bits) & _WORD for bits in (0, 32)] for n in (step, seed))
    words = philox([quads, low, high, row[:, None]], key)
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :size]
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four words of noise for four of a counter and two of a key, as int64 from 0 to 2**32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2**64
        c0, c1 = (odd >> 32) & _WORD ^ c1 ^ k0, odd & _WORD
        c2, c3 = (even >> 32) & _WORD ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


@sample_token.impl("torch")
def _torch(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    do_sample: bool = True,
) -> Tensor:
    """Thresholds from the top_k largest alone, which are sorted already; nothing waits for the device."""
    if not do_sample:
        return _clean(logits).argmax(dim=-1)
    return _draw(kept_scores_by_topk(logits, temperature, top_k, top_p, min_p), seed, step)


def kept_scores_by_topk(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """As `kept_scores`; with top_k, top_p sorts nothing: it needs only the tokens that top_k keeps."""
    scores = _scores(logits, temperature)
    size = scores.shape[1]
    if top_k > 0 or top_p == 1:
        largest = scores.topk(min(max(top_k, 1), size)).values
    else:
        largest = scores.sort(dim=-1, descending=True).values
    first = largest[:, :1].clamp(min=torch.finfo(scores.dtype).min)  # in a row of -infinity
    kept = _drop_below(scores, largest[:, -1:]) if top_k > 0 else scores
    if top_p < 1:
        shares, total = (largest - first).exp(), (kept - first).exp().sum(dim=-1, keepdim=True)
        stays = shares.cumsum(dim=-1) - shares < top_p * total
        stays = stays | (torch.arange(stays.shape[1], device=stays.device) == 0)
        kept = _drop_below(kept, largest.masked_fill(~stays, torch.inf).amin(dim=-1, keepdim=True))
    if min_p > 0:
        kept = kept.masked_fill((kept - first).exp() < min_p, -torch.inf)
    return kept


def _triton_why_not(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> list[str]:
    reasons = triton_why_not(logits)
    if logits.shape[1] > _MAX_VOCABULARY:
        reasons.append(f"a vocabulary of {logits.shape[1]} is above {_MAX_VOCABULARY}")
    return reasons


def _triton_configs(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    do_sample: bool,
) -> Sequence[Any]:
    from burnish.kernels.sample import sample_configs

    return sample_configs(logits, (top_k > 0 or top_p < 1) and do_sample)


@sample_token.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    logits: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    do_sample: bool = True,
    config: Any = None,
) -> Tensor:
    """Rows split among programs: one launch to choose, one before it for every few bits of a filter's threshold."""
    from burnish.kernels.sample import largest_token, sample_token

    if not do_sample:
        return largest_token(logits, config)
    assert seed is not None
    assert step is not None
    return sample_token(logits, seed, step, temperature, top_k, top_p, min_p, config)
