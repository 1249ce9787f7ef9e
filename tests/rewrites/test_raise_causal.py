"""Masks whose values are a lower triangle become causality, whatever they are called; others stay a bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.numerics import check, oracle
from tests import zoo
from tests.zoo.plain import NanoAttention

from .conftest import Rewritten, normal

aten = torch.ops.aten
MOST, LENGTH, WIDTH = 12, 5, 8
LOWER = torch.ones(MOST, MOST).tril()
X = normal(2, 3, LENGTH, WIDTH)


class Masked(nn.Module):
    """Attention of x with itself under what `read(buffer, number of rows)` makes of a buffer."""

    def __init__(self, buffer: Tensor, read: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.register_buffer("kept", buffer)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        mask = self.read(self.kept, x.shape[2])  # type: ignore[arg-type]
        return F.scaled_dot_product_attention(x, x.sin(), x.cos(), mask)


def is_causal(found: Rewritten) -> bool:
    assert found.ops == Counter(attention=1)
    _, _, _, bias, padding, causal, window, *_ = found.calls[0]
    assert (padding, window) == (None, None)
    assert (bias is None) == causal
    return bool(causal)


def corner(mask: Tensor, length: int) -> Tensor:
    return mask[..., :length, :length]


HIDING = torch.zeros(MOST, MOST).masked_fill(LOWER == 0, float("-inf"))
CAUSAL: dict[str, tuple[Tensor, Callable[[Tensor, int], Tensor]]] = {
    "bool": (LOWER.bool(), corner),
    "of four dims": (LOWER.bool().view(1, 1, MOST, MOST), corner),
    "what hides": (~LOWER.bool(), lambda mask, length: ~corner(mask, length)),
    "ones and zeros": (LOWER, lambda mask, length: corner(mask, length) != 0),
    "integers": (LOWER.long(), lambda mask, length: corner(mask, length).bool()[None, None]),
    "converted first": (LOWER, lambda mask, length: corner(mask.bool(), length)),
    "additive": (HIDING, corner),
    "additive, finite": (LOWER, lambda mask, length: (1.0 - corner(mask, length)) * -1e9),
    "made with tril": (LOWER, lambda _, length: torch.ones(length, length).tril().bool()),
    "made with triu": (LOWER, lambda _, length: torch.full((length, length), float("-inf")).triu(1)),
    "triangle of a buffer": (torch.ones(MOST, MOST), lambda mask, length: corner(mask, length).tril() == 1),
}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_a_lower_triangle_is_causality(spelling: str, rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Masked(*CAUSAL[spelling]), X)
    assert is_causal(found)
    assert {aten.slice.Tensor, aten.tril.default, aten.triu.default}.isdisjoint(found.targets)
    assert found.raised.matches["attention: causal mask"] == 1


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_attention(bias: bool, rewrite: Callable[..., Rewritten]) -> None:
    model = zoo.seeded(NanoAttention(32, 4, MOST, bias=bias, sdpa=False, dropout=0.1))
    found = rewrite(model, normal(2, LENGTH, 32))
    assert found.calls[1][3:6] == (None, None, True)
    assert found.ops == Counter(linear=2, attention=1)
    assert not found.raised.near_misses


BANDED, ONE_MORE = LOWER - LOWER.tril(-3), LOWER.clone()
ONE_MORE[2, 7] = 1.0
OTHERS: dict[str, tuple[Tensor, Callable[[Tensor, int], Tensor]]] = {
    "banded": (BANDED.bool(), corner),
    "one more": (ONE_MORE.bool(), corner),
    "upper": (LOWER.t().contiguous().bool(), corner),
    "all": (torch.ones(MOST, MOST, dtype=torch.bool), corner),
    "one triangle of two": (
        torch.stack([LOWER, BANDED])[None].bool(),
        lambda mask, length: mask[:, :1, :length, :length],
    ),
    "hardly hidden": (HIDING.clamp(min=-5.0), corner),
    "slopes": (HIDING - (torch.arange(MOST) - torch.arange(MOST)[:, None]).abs(), corner),
    "tril of another diagonal": (LOWER, lambda _, length: torch.ones(length, length).tril(1).bool()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_stays_a_bias(name: str, rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Masked(*OTHERS[name]), X)
    assert not is_causal(found)
    made_of = "ones" if name.startswith("tril") else "kept"
    assert (
        f"attention: causal mask: attention_default: its bias, made of {made_of}, is no lower triangle" in found.reasons
    )


class Later(nn.Module):
    """The last queries of a longer past, under rows of a kept triangle."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.register_buffer("kept", LOWER.bool())
        self.last = last

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        first = k.shape[2] - q.shape[2] if self.last else 0
        mask = self.kept[first : first + q.shape[2], : k.shape[2]]  # type: ignore[index]
        return F.scaled_dot_product_attention(q, k, k.cos(), mask)


def test_queries_at_the_end_of_the_keys(rewrite: Callable[..., Rewritten]) -> None:
    assert is_causal(rewrite(Later(last=True), X, normal(2, 3, LENGTH + 4, WIDTH)))


def test_rows_of_other_queries_stay_a_bias(rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Later(last=False), X, normal(2, 3, LENGTH + 4, WIDTH))
    assert not is_causal(found)
    assert "kept is read from row 0 on, which need not be the first query's" in found.reasons


def test_a_mask_that_is_trained_stays_a_bias(rewrite: Callable[..., Rewritten]) -> None:
    model = Masked(LOWER, corner)
    del model.kept
    model.kept = nn.Parameter(HIDING.clone())
    assert not is_causal(rewrite(model, X))


def test_a_buffer_that_changes_is_looked_at_again(untimed: None) -> None:
    """`optimize` reads the triangle once, and never uses it again: what is written into it must be seen."""
    model = Masked(LOWER.bool(), corner).eval()
    fast: Any = burnish.optimize(model, (X,), cache="off")
    assert fast.schedule.history[1].matches["attention: causal mask"] == 1
    with torch.no_grad():
        model.kept.logical_or_(torch.ones(MOST, MOST, dtype=torch.bool).triu(5))
        model.kept[0, 1] = True
        assert check(fast(X), model(X), oracle(model, X)).ok
    assert "attention: causal mask" not in fast.schedule.history[1].matches
