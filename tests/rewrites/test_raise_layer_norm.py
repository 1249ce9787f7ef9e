"""Layer norms that are written out; and what only looks like one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conftest import Rewritten, normal

WIDTH, EPS = 8, 1e-3
X = normal(2, 5, WIDTH)

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


class Module(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(WIDTH, seed=1)), nn.Parameter(normal(WIDTH, seed=2))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


VARIANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "unbiased=False": lambda x: x.var(-1, keepdim=True, unbiased=False),
    "correction=0": lambda x: torch.var(x, dim=2, keepdim=True, correction=0),
    "pow": lambda x: centred(x).pow(2).mean(dim=-1, keepdim=True),
    "**": lambda x: ((x - torch.mean(x, -1, keepdim=True)) ** 2).mean(-1, True),
}
SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "over sqrt": lambda x, var, w, b: centred(x) / torch.sqrt(var + EPS) * w + b,
    "times rsqrt": lambda x, var, w, b: b + w * (torch.rsqrt(EPS + var) * centred(x)),
    "weight first": lambda x, var, w, b: w * centred(x) / (var + EPS).sqrt() + b,
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_layer_norm_written_out(variance: str, spelling: str, rewrite: Callable[..., Rewritten]) -> None:
    model = Module(lambda x, w, b: SPELLINGS[spelling](x, VARIANCES[variance](x), w, b))
    found = rewrite(model, X)
    assert found.ops == Counter(layer_norm=1)
    assert sum(found.targets.values()) == 1
    (x, weight, bias, eps) = found.calls[0]
    assert (x.name, weight.target, bias.target, eps) == ("x", "weight", "bias", EPS)
    assert not found.raised.near_misses


def over_sqrt(x: Tensor) -> Tensor:
    return centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


@pytest.mark.parametrize(
    ("norm", "weights"),
    [
        (lambda x, w, b: over_sqrt(x), (None, None)),
        (lambda x, w, b: over_sqrt(x) * w, ("weight", None)),
        (lambda x, w, b: over_sqrt(x) + b, (None, "bias")),
        (lambda x, w, b: F.layer_norm(x, (WIDTH,), eps=EPS) * w + b, ("weight", "bias")),
    ],
    ids=["plain", "weight alone", "bias alone", "around torch's own"],
)
def test_weights_that_are_there(
    norm: Norm, weights: tuple[str | None, str | None], rewrite: Callable[..., Rewritten]
) -> None:
    found = rewrite(Module(norm), X)
    assert sum(found.targets.values()) == 1
    assert tuple(w and w.target for w in found.calls[0][1:3]) == weights


def test_half_precision(rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Module(lambda x, w, b: over_sqrt(x) * w + b).bfloat16(), X.bfloat16())
    assert found.ops == Counter(layer_norm=1)


def test_a_sum_with_what_is_no_vector_stays(rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Module(lambda x, w, b: over_sqrt(x) * x.sin() + x), X)
    assert found.calls[0][1:3] == (None, None)
    assert "weight of shape (x[0], x[1], x[2]) is not one number for each of the last dim" in found.reasons


STD = "layer_norm: standard deviation: div: eps is added to the standard deviation"


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + EPS) * w + b, "var: unbiased is True where"),
        (lambda x, w, b: w * centred(x) / (x.std(-1, keepdim=True) + EPS) + b, STD),
        (lambda x, w, b: centred(x) / (x.std(-1, keepdim=True, unbiased=False) + EPS) * w + b, STD),
        (lambda x, w, b: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, False, True) + EPS), "mean: dim is 1"),
        (lambda x, w, b: centred(x) / (x.var(-1, False, True).sqrt() + EPS), "add: is add where the pattern has sqrt"),
        (lambda x, w, b: centred(x) / (x.sin().var(-1, False, True) + EPS).sqrt(), "var: "),
    ],
    ids=["unbiased", "std", "biased std", "another dim", "eps outside", "another's variance"],
)
def test_what_is_no_layer_norm(norm: Norm, reason: str, rewrite: Callable[..., Rewritten]) -> None:
    found = rewrite(Module(norm), X)
    assert not found.ops
    assert reason in found.reasons
