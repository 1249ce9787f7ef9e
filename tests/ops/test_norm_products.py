"""An RMS norm and the product that alone reads it: against both one after the other, what it costs, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import OPS, Op
from burnish.ops import gated_mlp, linear, rms_norm, rms_norm_gated_mlp, rms_norm_linear
from tests.ops.matrix import DTYPES, assert_impls

EACH = pytest.mark.parametrize(
    ("op", "product"), [(rms_norm_linear, linear), (rms_norm_gated_mlp, gated_mlp)], ids=lambda op: op.name
)


def arguments(product: Op, dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Those of the norm, and those of the product but its x."""
    x, scale = randn(2, 4, 64, dtype=dtype), randn(64, dtype=dtype, seed=1)
    weights = (randn(n, k, dtype=dtype, seed=4) / k**0.5 for n, k in ((48, 64), (80, 24)))
    first, second = weights
    return (x, scale, 1e-3), (first, None, "silu") if product is linear else (first, second, None, None, "gelu")


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_norm_and_then_the_product(op: Op, product: Op, dtype: torch.dtype) -> None:
    norm_args, product_args = arguments(product, dtype)
    separate = product.reference(rms_norm.reference(*norm_args), *product_args)
    assert torch.equal(op.reference(*norm_args, *product_args), separate)
    assert "torch" in assert_impls(op, *norm_args, *product_args)


@EACH
def test_the_normalized_x_costs_nothing(op: Op, product: Op) -> None:
    norm_args, product_args = arguments(product)
    both, first = op.cost(*norm_args, *product_args), rms_norm.cost(*norm_args)
    second = product.cost(norm_args[0], *product_args)
    assert both.flops == first.flops + second.flops
    assert both.bytes == first.bytes + second.bytes - 2 * norm_args[0].nbytes


@EACH
def test_impls_of_two_parts_refuse_what_either_refuses(op: Op, product: Op) -> None:
    norm_args, product_args = arguments(product, torch.bfloat16)
    mixed = (norm_args[0], norm_args[1].float(), *norm_args[2:])
    assert any("float32" in reason for reason in op.impls["torch"].why_not(*mixed, *product_args))
    many = (norm_args[0].repeat(5, 5, 1), *norm_args[1:])
    for family, most in (("gemv", 8), ("skinny", 64)):
        separate = op.impls[f"triton_then_{family}"].why_not(*many, *product_args)
        assert separate[0] == "the inputs are on cpu, not on a CUDA device"
        assert len([reason for reason in separate if f"{most}" in reason]) == 1
    assert "x has 200 rows; the kernel takes up to 8" in op.impls["triton_gemv"].why_not(*many, *product_args)
    scattered = norm_args[0].repeat(2, 2, 2)[::2, ::2, ::2]
    assert not op.impls["triton_then_gemv"].why_not(scattered, *norm_args[1:], *product_args)[1:]  # the norm's is whole


@EACH
def test_configs_are_of_the_part_that_has_several(op: Op, product: Op) -> None:
    norm_args, product_args = arguments(product, torch.bfloat16)
    bound = op.bind(*norm_args, *product_args)
    of_product = product.impls["triton_gemv"].configs(*product.bind(norm_args[0], *product_args))  # type: ignore[misc]
    assert op.impls["triton_then_gemv"].configs(*bound) == of_product  # type: ignore[misc]
    assert op.impls["triton_gemv"].configs(*bound) == of_product  # type: ignore[misc]
    assert op.impls["triton_torch"].configs(*bound) == rms_norm.impls["triton"].configs(*norm_args)  # type: ignore[misc]
    assert op.impls["torch"].configs is None


X, V, W = torch.ones(2, 4), torch.ones(4), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        (
            "rms_norm_linear",
            (X, torch.ones(3), 1e-6, W),
            ValueError,
            r"norm_weight has shape \(3,\); it must be \(4,\)",
        ),
        ("rms_norm_linear", (X, V.long(), 1e-6, W), TypeError, "norm_weight has dtype torch.int64"),
        ("rms_norm_linear", (X, V, 1e-6, W[:, :3]), ValueError, r"weight has shape \(6, 3\)"),
        ("rms_norm_linear", (X, V, 1e-6, W, None, "elu"), ValueError, "activation is 'elu'"),
        ("rms_norm_linear", (X, torch.ones(2, 4), 1e-6, W), ValueError, r"norm_weight has shape \(2, 4\)"),
        ("rms_norm_linear", (X, V, 1e-6, W.half()), TypeError, "weight has dtype torch.float16 where x has"),
        ("rms_norm_gated_mlp", (X, W[0, :1], 1e-6, W, torch.ones(4, 3)), ValueError, r"norm_weight has shape \(1,\)"),
        ("rms_norm_gated_mlp", (X, V, 1e-6, W, torch.ones(4, 2)), ValueError, r"down_weight has shape \(4, 2\)"),
    ],
)
def test_bad_input_is_named(name: str, args: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OPS[name](*args)


def test_eps_is_the_norms() -> None:
    x = torch.full((1, 4), 1e-3)
    small, large = (rms_norm_linear(x, None, eps, torch.eye(4)) for eps in (1e-12, 1e-2))
    assert isinstance(small, Tensor)
    assert (small / large > 50).all()
