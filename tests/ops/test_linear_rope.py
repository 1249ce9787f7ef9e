"""A product whose heads leave it rotated: against linear and rope one after the other, what it refuses, reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.op import Cost
from burnish.ops import linear, linear_rope, rope, rope_qk
from tests.ops.matrix import DTYPES, assert_impls

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Any numbers: both halves are taken as they come."""
    return randn(*shape, dtype=dtype, seed=8), randn(*shape, dtype=dtype, seed=9)


def inputs(
    s: int = 5, n: int = 48, k: int = 24, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = randn(n, k, dtype=dtype, seed=1) / k**0.5
    return randn(2, s, k, dtype=dtype), weight, randn(n, dtype=dtype, seed=2) if bias else None


def apart(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    q_columns: int,
    rotated: int,
) -> Tensor:
    """As a model has it before: a product, its parts, and queries and keys rotated."""
    q, k, v = linear.reference(x, weight, bias).tensor_split((q_columns, rotated), dim=-1)
    heads = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (q, k))
    turned = rope_qk.reference(*heads, cos, sin)
    return torch.cat([*(part.transpose(1, 2).flatten(2) for part in turned), v], dim=-1)


@DTYPE
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_product_and_rope_of_its_parts(bias: bool, dtype: torch.dtype) -> None:
    args = (*inputs(dtype=dtype, bias=bias), *tables(5, 8, dtype=dtype), 8)
    separate = apart(*args, 16, 32)
    assert_close(linear_rope(*args, 32), separate, oracle(apart, *args, 16, 32))
    assert torch.equal(linear_rope.reference(*args, 32), separate)


@DTYPE
@pytest.mark.parametrize(("head_dim", "rotated"), [(2, 2), (2, 48), (8, 40), (12, 48), (20, 20), (48, 48)])
@pytest.mark.parametrize("s", [1, 33])
def test_widths(s: int, head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(s, dtype=dtype)
    cos, sin = tables(s, head_dim, dtype=dtype)
    assert_impls(linear_rope, x, weight, bias, cos, sin, head_dim, rotated)
    assert_impls(linear_rope, x, weight, None, torch.stack((cos, -cos)), torch.stack((sin, sin)), head_dim, rotated)
    assert_impls(linear_rope, x, weight, bias, cos[None], sin[None], head_dim, rotated)


def test_columns_that_are_not_rotated_are_the_products() -> None:
    x, weight, bias = inputs()
    cos, sin = tables(5, 8)
    for name in ("torch", "reference"):
        out = linear_rope.impls[name].fn(x, weight, bias, cos, sin, 8, 16)
        assert torch.equal(out[..., 16:], linear.reference(x, weight, bias)[..., 16:])
        assert not torch.isclose(out[..., :16], linear.reference(x, weight, bias)[..., :16]).all()


def test_layouts() -> None:
    x, weight, bias = inputs()
    cos, sin = (table[3:8, :8] for table in tables(9, 10))
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(2, 5, 24)):
        assert_impls(linear_rope, given, weight, bias, cos, sin, 8, 32)
        assert_impls(linear_rope, given, weight.t().contiguous().t(), None, cos, sin.contiguous(), 8, 32)


def test_the_cost_is_the_products_and_the_rotations() -> None:
    x, weight, bias = inputs()
    cos, sin = tables(5, 8)
    product, turned = linear.cost(x, weight, bias), rope.cost(torch.empty(2, 4, 5, 8), cos, sin)
    table_bytes = 2 * 5 * 8 * 4
    assert linear_rope.cost(x, weight, bias, cos, sin, 8, 32) == Cost(
        product.flops + turned.flops, product.bytes + table_bytes
    )


def without_device(name: str, *args: Any) -> list[str]:
    return [reason for reason in linear_rope.impls[name].why_not(*args) if "not on a CUDA device" not in reason]


def test_reasons_against_torch_and_its_kernel() -> None:
    x, weight, _ = inputs(dtype=torch.bfloat16)
    assert linear_rope.impls["torch"].why_not(x, weight, None, *tables(5, 8), 8, 16) == [
        "cos is torch.float32 where x is torch.bfloat16",
        "sin is torch.float32 where x is torch.bfloat16",
    ]
    assert without_device("torch_triton", x, weight, None, *tables(5, 8), 8, 16) == []
    assert without_device("torch_triton", x, weight, None, *tables(5, 8, dtype=torch.float64), 8, 16) == [
        "cos is torch.float64; the kernel takes float16, bfloat16 and float32",
        "sin is torch.float64; the kernel takes float16, bfloat16 and float32",
    ]
    wide = randn(2048, 24, dtype=torch.bfloat16)
    assert without_device("torch_triton", x, wide, None, *tables(5, 2048), 2048, 2048) == [
        "head_dim 2048 is above 1024"
    ]
    assert without_device("torch_triton", x[:0], weight, None, *tables(5, 8), 8, 16) == ["an input is empty"]


BF16 = torch.bfloat16
COS, SIN = tables(33, 64, dtype=BF16)
PRODUCT = inputs(33, 192, 64, BF16)
REFUSED = [
    ((*inputs(33, 192, 64), COS, SIN, 64), "the inputs are torch.float32; the kernel takes float16 and bfloat16"),
    ((*inputs(16, 192, 64, BF16), COS[:16], SIN[:16], 64), "x has 32 rows; the kernel takes 33 and more"),
    ((*PRODUCT, COS[:, :32], SIN[:, :32], 32), "head_dim is 32; the kernel takes 64 and 128"),
    ((*PRODUCT, COS.double(), SIN, 64), "cos is torch.float64"),
    ((*PRODUCT, COS, SIN.double(), 64), "sin is torch.float64"),
    ((*PRODUCT, COS.t().contiguous().t(), SIN, 64), "cos has strides (1, 33); its rows must be contiguous"),
    ((*PRODUCT, COS, SIN.t().contiguous().t(), 64), "sin has strides (1, 33); its rows must be contiguous"),
    ((*PRODUCT, COS, SIN.repeat(1, 2)[:, :64], 64), "cos has strides (64, 1), sin (128, 1); they must be equal"),
    ((PRODUCT[0].transpose(0, 1).contiguous().transpose(0, 1), *PRODUCT[1:], COS, SIN, 64), "x has strides"),
    ((PRODUCT[0], PRODUCT[1].t().contiguous().t(), None, COS, SIN, 64), "a weight has strides (1, 192)"),
]


def test_the_gluon_kernel_takes_whole_heads_with_tables_in_rows() -> None:
    assert without_device("gluon", *PRODUCT, COS, SIN, 64, 128) == []
    assert without_device("gluon", *PRODUCT, COS[None], SIN[None], 64, 64) == []
    assert without_device("gluon", *PRODUCT, *tables(2, 33, 128), 128, 128) == []


@pytest.mark.parametrize(("args", "reason"), REFUSED)
def test_reasons_against_the_gluon_kernel(args: tuple[Any, ...], reason: str) -> None:
    reasons = without_device("gluon", *args, args[-1])
    assert any(reason in stated for stated in reasons), reasons


X, W, T = torch.ones(2, 5, 8), torch.ones(24, 8), torch.ones(5, 8)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((X[0], W, None, T, T, 8, 16), ValueError, r"x has shape \(5, 8\); it must be \(batch, sequence, K\)"),
        ((X, W[:, :4], None, T, T, 8, 16), ValueError, r"weight has shape \(24, 4\)"),
        ((X, W.double(), None, T, T, 8, 16), TypeError, "weight has dtype torch.float64 where x has torch.float32"),
        ((X, W, W[:, 0].double(), T, T, 8, 16), TypeError, "bias has dtype torch.float64"),
        ((X, W, W[:8, 0], T, T, 8, 16), ValueError, r"bias has shape \(8,\); it must be \(24,\)"),
        ((X, W, None, T.long(), T, 8, 16), TypeError, "cos has dtype torch.int64"),
        ((X, W, None, T, T.long(), 8, 16), TypeError, "sin has dtype torch.int64"),
        ((X, W, None, T, T[:, :4], 8, 16), ValueError, r"sin has shape \(5, 4\); it must be that of cos, \(5, 8\)"),
        ((X, W, None, T[:4], T[:4], 8, 16), ValueError, r"cos has shape \(4, 8\)"),
        ((X, W, None, T[:, :4], T[:, :4], 8, 16), ValueError, r"it must be \(S, 8\) or \(1 or B, S, 8\)"),
        ((X, W, None, T.expand(3, 5, 8), T.expand(3, 5, 8), 8, 16), ValueError, r"cos has shape \(3, 5, 8\)"),
        ((X, W, None, T[0], T[0], 8, 16), ValueError, r"cos has shape \(8,\)"),
        ((X, W, None, T[:, :3], T[:, :3], 3, 6), ValueError, "head_dim is 3; it must be positive and even"),
        ((X, W, None, T, T, 8, 12), ValueError, "rotated is 12; it must be a positive multiple of head_dim 8"),
        ((X, W, None, T, T, 8, 0), ValueError, "rotated is 0"),
        ((X, W, None, T, T, 8, 32), ValueError, "at most the 24 rows of weight"),
    ],
)
def test_bad_input_is_named(args: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        linear_rope(*args)
