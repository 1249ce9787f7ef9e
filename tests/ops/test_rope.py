"""Rotary position embedding: both pairings, partial widths, tables of every shape, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, check, oracle, randn
from burnish.ops import rope
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tables(
    length: int, width: int, interleaved: bool = False, start: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(start, start + length).double(), 0.9 ** torch.arange(width // 2).double())
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@DTYPE
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "r"), [(2, 2), (16, 16), (64, 64), (80, 32), (128, 128), (96, 2)])
@pytest.mark.parametrize("s", [1, 33])
def test_widths(s: int, d: int, r: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = (t.to(dtype) for t in tables(s, r, interleaved, start=7))
    for x in (randn(2, 3, s, d, dtype=dtype), randn(2, s, 3, d, dtype=dtype).transpose(1, 2)):
        assert_impls(rope, x, cos, sin, interleaved)
        assert_impls(rope, x, torch.stack((cos, -cos)), torch.stack((sin, sin)), interleaved)
        assert_impls(rope, x, cos[None], sin[None], interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_turns_pairs_in_the_complex_plane(interleaved: bool) -> None:
    def turn(x: Tensor) -> Tensor:
        pairs = x[..., :4].unflatten(-1, (2, 2))
        pairs = pairs if interleaved else pairs.transpose(-1, -2)
        angles = torch.outer(torch.arange(5, dtype=x.dtype), 0.9 ** torch.arange(2, dtype=x.dtype))
        turned = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(angles.new_ones(5, 2), angles)
        )
        turned = turned if interleaved else turned.transpose(-1, -2)
        return torch.cat((turned.flatten(-2), x[..., 4:]), -1)

    x = randn(2, 3, 5, 6)
    assert_close(rope(x, *tables(5, 4, interleaved), interleaved), turn(x), oracle(turn, x))


def test_scores_depend_on_distance_only() -> None:
    q, k = randn(1, 64, 1, 32, outliers=0), randn(1, 64, 1, 32, outliers=0, seed=1)

    def scores(at: int, other: int, dtype: torch.dtype = torch.float32) -> Tensor:
        a, b = (rope(t.to(dtype), *tables(1, 32, start=p, dtype=dtype)) for t, p in ((q, at), (k, other)))
        return (a * b).sum(-1)

    truth = scores(3, 7, torch.float64)
    assert_close(scores(103, 107), scores(3, 7), truth)
    assert not check(scores(3, 8), scores(3, 7), truth).ok


def test_it_agrees_with_hugging_face() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    q, k = randn(2, 4, 9, 32), randn(2, 2, 9, 32, seed=1)
    cos, sin = tables(9, 32)
    expected = llama.apply_rotary_pos_emb(q, k, cos[None], sin[None])
    truth = oracle(llama.apply_rotary_pos_emb, q, k, cos[None], sin[None])
    assert_close((rope(q, cos, sin), rope(k, cos, sin)), expected, truth)


def test_a_result_is_dense_where_the_input_is_a_slice() -> None:
    packed = randn(2, 5, 12, 16)[:, :, 4:8].transpose(1, 2)
    out = rope(packed, *tables(5, 16))
    assert out.stride() == torch.empty_like(packed).stride()
    assert out.transpose(1, 2).is_contiguous()
    assert_impls(rope, randn(1, 1, 5, 16).expand(2, 3, 5, 16), *tables(5, 16))


def test_tables_of_another_dtype_are_refused_by_the_impl_and_right_by_the_op() -> None:
    x, (cos, sin) = randn(1, 2, 5, 16, dtype=torch.bfloat16), tables(5, 16)
    assert rope.impls["torch"].why_not(x, cos, sin) == [
        "cos is torch.float32 where x is torch.bfloat16",
        "sin is torch.float32 where x is torch.bfloat16",
    ]
    assert rope(x, cos, sin).dtype == torch.bfloat16


X, T = torch.ones(2, 3, 5, 8), torch.ones(5, 8)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((X[0], T, T), ValueError, r"x has shape \(3, 5, 8\)"),
        ((X, T, T[:, :4]), ValueError, r"sin has shape \(5, 4\); it must be that of cos, \(5, 8\)"),
        ((X, T[:4], T[:4]), ValueError, r"cos has shape \(4, 8\)"),
        ((X, T.expand(3, 5, 8), T.expand(3, 5, 8)), ValueError, r"cos has shape \(3, 5, 8\)"),
        ((X, T[:, :3], T[:, :3]), ValueError, "cos has 3 columns"),
        ((X[..., :4], T, T), ValueError, "cos has 8 columns; it must be an even number up to head_dim 4"),
        ((X.long(), T, T), TypeError, "x has dtype torch.int64"),
    ],
)
def test_bad_input_is_named(args: tuple[Tensor, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rope(*args)
