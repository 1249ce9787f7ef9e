"""Layer and RMS normalization, alone, after a residual addition, and over BERT's embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from burnish.numerics import assert_close, randn
from burnish.op import OPS, Op
from burnish.ops import add_layer_norm, add_rms_norm, embedding_layer_norm, layer_norm, rms_norm
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@DTYPE
@pytest.mark.parametrize("n", [33, 128, 768, 4096, 16384])
def test_widths(n: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias = randn(5, n, dtype=dtype), *(randn(*s, dtype=dtype) for s in ((5, n), (n,), (n,)))
    assert_impls(layer_norm, x, weight, bias)
    assert_impls(rms_norm, x, weight)
    assert_impls(add_layer_norm, x, residual, weight, bias)
    assert_impls(add_rms_norm, x, residual, weight)


@DTYPE
def test_a_mean_far_from_zero(dtype: torch.dtype) -> None:
    x = randn(16, 768, dtype=dtype, outliers=0) * 0.5 - 20
    assert_impls(layer_norm, x)
    assert_impls(rms_norm, x)
    assert_impls(add_layer_norm, x, x)


@pytest.mark.parametrize("op", [layer_norm, rms_norm], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("of_x", "of_weight"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_weights_of_another_dtype(op: Op, of_x: torch.dtype, of_weight: torch.dtype) -> None:
    x, weight = randn(4, 96, dtype=of_x), randn(96, dtype=of_weight)
    assert op(x, weight).dtype == of_x
    assert_impls(op, x, weight)
    assert_impls(OPS[f"add_{op.name}"], x, x, weight)


@DTYPE
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps_even_where_rows_are_zero(eps: float, dtype: torch.dtype) -> None:
    x = randn(4, 96, dtype=dtype) * 1e-3
    x[1] = 0
    assert_impls(layer_norm, x, None, None, eps)
    assert_impls(rms_norm, x, None, eps)


def test_strided_inputs_of_every_kind() -> None:
    weight = randn(12)
    for x in (
        randn(12, 7).t(),
        randn(5, 12, 7).transpose(1, 2),
        randn(7, 24)[:, ::2],
        randn(7, 1).expand(7, 12),
        randn(1, 12).expand(7, 12),
        randn(0, 12),
        randn(12),
    ):
        assert_impls(layer_norm, x, weight, weight)
        assert_impls(rms_norm, x, weight)
        assert_impls(add_rms_norm, x, x, weight)


def test_they_agree_with_torchs_modules() -> None:
    x, weight, bias = randn(3, 5, 64), randn(64, seed=1), randn(64, seed=2)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (64,), weight, bias, 1e-5))
    expected = F.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    assert_close(rms_norm(x, weight), F.rms_norm(x, (64,), weight, 1e-6), expected)
    normed, total = add_layer_norm(x, x, weight, bias)
    assert torch.equal(total, 2 * x)
    assert torch.equal(normed, F.layer_norm(2 * x, (64,), weight, bias))


def test_the_sum_is_rounded_before_it_is_normalized() -> None:
    x, residual = randn(8, 64, dtype=torch.bfloat16), randn(8, 64, dtype=torch.bfloat16, seed=1)
    normed, total = add_rms_norm(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total))


WITH_SUM = ("add_layer_norm", "add_rms_norm", "linear_add_layer_norm", "linear_add_rms_norm")


@DTYPE
@pytest.mark.parametrize("name", WITH_SUM)
def test_without_the_sum_the_rest_is_the_same(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    (sample,) = (s for s in op.samples("cpu", dtype) if s.label == "no sum")
    *args, keep_sum = op.bind(*sample.args, **sample.kwargs)
    assert keep_sum is False
    for impl in op.impls.values():
        if not impl.why_not(*args, False):
            (normed, total), (same, nothing) = impl.fn(*args, True), impl.fn(*args, False)
            assert torch.equal(normed, same), impl.name
            assert (nothing.shape, nothing.dtype, nothing.device) == ((0,), total.dtype, total.device), impl.name
    more, less = op.cost(*args, True), op.cost(*args, False)
    assert more.flops == less.flops
    assert more.bytes - less.bytes == total.numel() * total.element_size()


def test_embeddings_agree_with_berts() -> None:
    word, position, types = randn(50, 16), randn(20, 16, seed=1), randn(2, 16, seed=2)
    ids, kinds, positions = torch.randint(50, (2, 7)), torch.randint(2, (2, 7)), torch.arange(3, 10)[None]
    result = embedding_layer_norm(ids, word, positions, position, kinds, types, None, None, 1e-12)
    expected = F.layer_norm(word[ids] + types[kinds] + position[positions], (16,), eps=1e-12)
    assert_close(result, expected, F.layer_norm((word[ids] + types[kinds] + position[positions]).double(), (16,)))
    assert_impls(embedding_layer_norm, ids.int(), word, positions.int(), position)


X = torch.ones(2, 4)
IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        ("layer_norm", (X, torch.ones(3)), ValueError, r"weight has shape \(3,\); it must be \(4,\)"),
        ("layer_norm", (X, None, torch.ones(2, 4)), ValueError, r"bias has shape \(2, 4\)"),
        ("layer_norm", (X.long(),), TypeError, "x has dtype torch.int64; it must be a floating-point tensor"),
        ("layer_norm", (torch.tensor(1.0),), ValueError, "x has no dimensions"),
        ("rms_norm", (X, torch.ones(5)), ValueError, r"weight has shape \(5,\)"),
        ("rms_norm", (X, torch.ones(4).long()), TypeError, "weight has dtype torch.int64"),
        ("add_layer_norm", (X, torch.ones(4)), ValueError, r"residual has shape \(4,\); it must be x's, \(2, 4\)"),
        ("add_rms_norm", (X, X.half()), TypeError, "residual has dtype torch.float16 where x has torch.float32"),
        ("embedding", (IDS[0], X), ValueError, r"ids has shape \(3,\)"),
        ("embedding", (IDS, X, IDS), ValueError, "position_ids and position belong together"),
        ("embedding", (IDS, X, IDS.float(), X), TypeError, "position_ids has dtype torch.float32"),
        ("embedding_layer_norm", (IDS[0], X, IDS, X), ValueError, r"ids has shape \(3,\)"),
        ("embedding_layer_norm", (IDS, X, IDS.float(), X), TypeError, "position_ids has dtype torch.float32"),
        ("embedding_layer_norm", (IDS, X, IDS[:, :2], X), ValueError, r"position_ids has shape \(2, 2\)"),
        ("embedding_layer_norm", (IDS, X, IDS, X, IDS), ValueError, "type_ids and type belong together"),
        ("embedding_layer_norm", (IDS, X, IDS, torch.ones(2, 3)), ValueError, r"position has shape \(2, 3\)"),
        ("embedding_layer_norm", (IDS, X, IDS, X.half()), TypeError, "position has dtype torch.float16 where word"),
        ("embedding_layer_norm", (IDS + 9, X, IDS, X), IndexError, "out of range"),
    ],
)
def test_bad_input_is_named(name: str, args: tuple[torch.Tensor, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OPS[name](*args)
