"""Scalar parameters of patterns that torch.export would have made constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn

from burnish.graph import Pattern, find_matches, trace

X = randn(2, 4, 8)


def bound(model, pattern, examples, inputs=(X,)):
    return [m.bindings for m in find_matches(trace(model, inputs), pattern, example_inputs=examples)]


def test_floats():
    def rms(x, w, eps: float):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    def model(x, w):
        return rms(rms(x, w, 1e-5), w, 1e-12)

    found = bound(model, rms, (randn(3, 6), randn(6), 1.0), (X, randn(8)))
    assert [b["eps"] for b in found] == [1e-5, 1e-12]


def test_an_example_that_is_a_number_needs_no_annotation():
    assert [b["s"] for b in bound(lambda x: x * 0.125, lambda x, s: x * s, (X, 1.0))] == [0.125]


def test_a_default_needs_no_example():
    assert [b["eps"] for b in bound(lambda x: x + 1e-3, lambda x, eps=1e-5: x + eps, (X,))] == [1e-3]


def test_an_integer_that_must_divide():
    def heads_first(x, heads: int):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    found = bound(lambda x: x.view(2, 4, 4, 2).transpose(1, 2), heads_first, (randn(3, 5, 6), 3))
    assert [b["heads"] for b in found] == [4]


def test_a_dtype():
    def cast(x, dtype: torch.dtype):
        return x.to(dtype).relu()

    found = bound(lambda x: x.to(torch.bfloat16).relu(), cast, (X, torch.float16))
    assert [b["dtype"] for b in found] == [torch.bfloat16]


def test_several_kinds_at_once():
    def pattern(x, eps: float, dim: int, keep: bool, approximate: str = "none"):
        return F.gelu(x + eps, approximate=approximate).sum(dim, keepdim=keep)

    def model(x):
        return F.gelu(x + 0.5, approximate="tanh").sum(1, keepdim=True)

    (values,) = bound(model, pattern, (X, 1.0, -1, False))
    assert {k: v for k, v in values.items() if k != "x"} == {"eps": 0.5, "dim": 1, "keep": True, "approximate": "tanh"}


def test_none_specialises_the_pattern():
    def pattern(x, w, b):
        return F.linear(x, w, b).relu()

    model = lambda x, w: F.linear(x, w).relu()  # noqa: E731
    (values,) = bound(model, pattern, (X, randn(3, 8), None), (X, randn(5, 8)))
    assert values["b"] is None
    with_bias = trace(lambda x, w, b: F.linear(x, w, b).relu(), (X, randn(5, 8), randn(5)))
    assert not find_matches(with_bias, pattern, example_inputs=(X, randn(3, 8), None))


def test_sizes_of_the_example_bind_any_size_but_other_integers_count():
    def pattern(x):
        return x.view(x.shape[0], -1).transpose(0, 1)

    assert len(bound(lambda x: x.view(8, 8).transpose(0, 1), pattern, (randn(3, 5, 7),))) == 1
    assert len(bound(lambda x: x.view(8, 8).transpose(1, 1), pattern, (randn(3, 5, 7),))) == 0
    assert len(bound(lambda x: x.view(2, 2, 16).transpose(0, 1), pattern, (randn(3, 5, 7),))) == 0
    assert len(bound(lambda x: x[..., :2].relu(), lambda x: x[..., :2].relu(), (randn(3, 5, 6),))) == 1
    assert len(bound(lambda x: x[..., :2].relu(), lambda x: x[..., :3].relu(), (randn(3, 5, 6),))) == 0


def test_symbolic_sizes_are_not_part_of_a_match():
    class Heads(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    auto = torch.export.Dim.AUTO
    gm = torch.export.export(Heads(), (X,), strict=False, dynamic_shapes=({0: auto, 1: auto},)).module()
    (match,) = find_matches(
        gm, lambda x: x.view(x.shape[0], x.shape[1], 3, -1).transpose(1, 2), example_inputs=(randn(2, 5, 6),)
    )
    assert [n.name for n in match.nodes] == ["view", "transpose"]


def test_what_cannot_be_kept_open_is_an_error():
    def reciprocal(x, s: float):
        return x * (1 / s)

    def branches(x, flag: bool):
        return x.relu() if flag else x.neg()

    def both(x, n: int):
        return x.sum(n) + (n + 1)

    def ignored(x, s: float):
        return x.relu()

    for pattern, example, message in (
        (reciprocal, 2.0, "the value of s does not occur as such"),
        (branches, True, "what is computed depends on flag=True"),
        (both, 1, "2 depends on n but is not its value"),
        (ignored, 2.0, "the value of s does not occur as such"),
    ):
        with pytest.raises(ValueError, match=message):
            Pattern.of(pattern, (X, example))
    with pytest.raises(TypeError, match="example_inputs must be a tuple"):
        Pattern.of(ignored, [X, 1.0])
    with pytest.raises(TypeError, match="do not fit its parameters: missing a required argument: 's'"):
        Pattern.of(ignored, (X,))


def test_constants_of_the_pattern_compare_by_value():
    table = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    gm = trace(lambda x: x * table, (X,))
    same, other = table.clone(), table + 1
    assert len(find_matches(gm, lambda x: x * same, example_inputs=(X,))) == 1
    assert len(find_matches(gm, lambda x: x * other, example_inputs=(X,))) == 0
