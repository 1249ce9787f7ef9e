"""The linear layer with its epilogues, and the gated MLP."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import assert_close, check, oracle, randn
from burnish.op import Cost, use
from burnish.ops import gated_mlp, linear
from burnish.ops._activations import ACTIVATIONS, GATES
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return randn(n, k, dtype=dtype, seed=seed) / k**0.5


@DTYPE
@pytest.mark.parametrize("m", [1, 2, 16, 33, 128, 4096])
def test_rows(m: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual = randn(m, 96, dtype=dtype), weights(40, 96, dtype), randn(40, dtype=dtype), None
    for activation in ("none", "gelu"):
        assert_impls(linear, x, weight, bias, activation, residual)
    assert_impls(linear, x, weight, None, "relu", randn(m, 40, dtype=dtype, seed=3))


@DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(activation: str, dtype: torch.dtype) -> None:
    x, weight, bias = randn(2, 9, 64, dtype=dtype), weights(48, 64, dtype), randn(48, dtype=dtype)
    residual = randn(2, 9, 48, dtype=dtype, seed=3)
    for b, r in itertools.product((None, bias), (None, residual)):
        ran = assert_impls(linear, x, weight, b, activation, r)
        assert "torch" in ran


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (1536, 384), (384, 1536), (768, 3072), (1000, 257)])
@pytest.mark.parametrize("m", [1, 2, 16, 33, 128])
def test_the_whole_matrix(m: int, n: int, k: int, activation: str, dtype: torch.dtype) -> None:
    x, residual = randn(m, k, dtype=dtype), randn(m, n, dtype=dtype, seed=3)
    for weight in (weights(n, k, dtype), weights(k, n, dtype).t()):
        for bias in (None, randn(n, dtype=dtype, seed=2)):
            assert_impls(linear, x, weight, bias, activation)
            assert_impls(linear, x, weight, bias, activation, residual)


@DTYPE
def test_strides_of_every_kind(dtype: torch.dtype) -> None:
    plain, weight = randn(6, 32, dtype=dtype), weights(24, 32, dtype)
    for x in (
        randn(32, 6, dtype=dtype).t(),
        randn(6, 64, dtype=dtype)[:, ::2],
        randn(1, 32, dtype=dtype).expand(6, 32),
        randn(2, 32, 3, dtype=dtype).transpose(1, 2),
        randn(32, dtype=dtype),
        randn(2, 3, 1, 32, dtype=dtype),
        randn(6, 64, dtype=dtype)[:1, :32],
        randn(1, 6, 64, dtype=dtype)[..., 32:],
    ):
        assert_impls(linear, x, weight, None, "silu")
    for strided in (
        weights(32, 24, dtype).t(),
        weights(48, 32, dtype)[::2],
        weights(24, 64, dtype)[:, ::2],
        weights(24, 40, dtype)[:, 3:35],
        weights(1, 32, dtype).expand(24, 32),
    ):
        assert_impls(linear, plain, strided)
    assert_impls(linear, plain, weight, randn(48, dtype=dtype)[::2], "none", randn(24, 6, dtype=dtype).t())
    assert_impls(linear, plain, weight, randn(1, dtype=dtype).expand(24), "relu")
    for thin in (weights(24, 64, dtype)[:, :1], weights(1, 24, dtype).t(), weights(1, 24, dtype)[:, ::2].t()):
        assert_impls(linear, randn(6, 1, dtype=dtype), thin)


def test_empty_inputs() -> None:
    assert linear(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)
    assert linear(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)
    assert linear(torch.ones(2, 0), torch.ones(4, 0), torch.ones(4)).tolist() == [[1.0] * 4] * 2
    assert gated_mlp(torch.ones(0, 3), torch.ones(8, 3), torch.ones(3, 4)).shape == (0, 3)


def test_the_two_gelus_are_told_apart_by_every_impl() -> None:
    x, weight = randn(16, 32), weights(32, 32)
    truth = oracle(linear.reference, x, weight, None, "gelu")
    for name, impl in linear.impls.items():
        if not impl.why_not(*linear.bind(x, weight)):
            wrong = impl.fn(x, weight, None, "gelu_tanh")
            assert not check(wrong, F.gelu(x @ weight.T), truth).ok, name


def test_an_explicit_impl_computes_what_the_reference_does() -> None:
    x, weight = randn(16, 32), weights(32, 32)
    for name, impl in linear.impls.items():
        if not impl.why_not(*linear.bind(x, weight)):
            with use(linear=name):
                assert_close(linear(x, weight), x @ weight.T, oracle(torch.matmul, x, weight.T))


def test_onednn_says_everything_that_is_against_it() -> None:
    x, strided = torch.ones(0, 4, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)[::2, ::2]
    reasons = linear.impls["onednn"].why_not(x, strided)
    assert len(reasons) == 3
    for word in ("float64", "empty", "strides (16, 2)"):
        assert any(word in reason for reason in reasons), word


def test_cost() -> None:
    x, weight = torch.empty(2, 3, 5), torch.empty(7, 5)
    assert linear.cost(x, weight, torch.empty(7)) == Cost(2 * 6 * 7 * 5, 4 * (30 + 35 + 7 + 42))
    mlp = gated_mlp.cost(x, torch.empty(8, 5), torch.empty(6, 4))
    assert mlp == Cost(2 * 6 * (8 * 5 + 4 * 6), 4 * (30 + 40 + 24 + 36))


@DTYPE
@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_gated_mlp_rows(rows: int, dtype: torch.dtype) -> None:
    x = randn(rows, 64, dtype=dtype)
    for activation in GATES:
        assert_impls(gated_mlp, x, weights(96, 64, dtype), weights(40, 48, dtype, 2), None, None, activation)


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("rows", [1, 16, 2048])
def test_gated_mlp_of_a_real_width(rows: int, activation: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and rows > 16:
        pytest.skip("the float16 reference takes minutes on a CPU without float16 products")
    x, gate_up, down = randn(rows, 1024, dtype=dtype), weights(5504, 1024, dtype), weights(1024, 2752, dtype, 2)
    assert_impls(gated_mlp, x, gate_up, down, None, None, activation)
    assert_impls(gated_mlp, x, gate_up.t().contiguous().t(), down.t().contiguous().t(), None, None, activation)


def test_gated_mlp_is_two_linears_and_the_gate_comes_first() -> None:
    x, gate, up, down = randn(5, 16), weights(12, 16), weights(12, 16, seed=2), weights(16, 12, seed=3)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    truth = oracle(lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), x, gate, up, down)
    assert_close(gated_mlp(x, torch.cat((gate, up)), down), expected, truth)


X, W = torch.ones(2, 4), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((X, torch.ones(6, 5)), ValueError, r"weight has shape \(6, 5\)"),
        ((X, torch.ones(4)), ValueError, r"weight has shape \(4,\)"),
        ((X, W, torch.ones(4)), ValueError, r"bias has shape \(4,\); it must be \(6,\)"),
        ((X, W, None, "swish"), ValueError, "activation is 'swish'; it must be one of none, relu, gelu, gelu_tanh"),
        (
            (X, W, None, "none", torch.ones(6)),
            ValueError,
            r"residual has shape \(6,\); it must be the result's, \(2, 6\)",
        ),
        ((X, W.half()), TypeError, "weight has dtype torch.float16 where x has torch.float32"),
        ((X, W, torch.ones(6).double()), TypeError, "bias has dtype torch.float64"),
        ((X.long(), W.long()), TypeError, "x has dtype torch.int64"),
    ],
)
def test_bad_input_of_linear_is_named(args: tuple[Tensor, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear(*args)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((X, torch.ones(6, 5), torch.ones(4, 3)), ValueError, r"gate_up_weight has shape \(6, 5\)"),
        ((X, torch.ones(5, 4), torch.ones(4, 3)), ValueError, "gate_up_weight has 5 rows"),
        ((X, W, torch.ones(4, 6)), ValueError, r"down_weight has shape \(4, 6\)"),
        ((X, W, torch.ones(4, 3), torch.ones(3)), ValueError, r"gate_up_bias has shape \(3,\)"),
        ((X, W, torch.ones(4, 3), None, torch.ones(3)), ValueError, r"down_bias has shape \(3,\)"),
        ((X, W, torch.ones(4, 3), None, None, "relu"), ValueError, "it must be one of silu, gelu, gelu_tanh"),
        ((X, W, torch.ones(4, 3).half()), TypeError, "down_weight has dtype torch.float16"),
    ],
)
def test_bad_input_of_gated_mlp_is_named(args: tuple[Tensor, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        gated_mlp(*args)
