"""Impls that both Ops have which end a branch, with a layer norm or an RMS norm.

They are written once for arguments of which those behind the residual are the norm's vectors, its eps and keep_sum.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from burnish.kernels.layout import copyable, wgmma_reasons
from burnish.op import Op
from burnish.ops._linear_norms import FEWEST_WHOLE
from burnish.ops._triton import hopper_why_not
from burnish.ops._triton_norms import triton_norm_why_not
from burnish.ops.linear import linear


def register_products(op: Op, *, rms: bool) -> None:
    """Impls for few rows: `linear`'s products of a few rows, with the residual in their epilogues, and the norm."""
    _register_product(
        op, rms, "triton_gemv", "Two kernels: a product of a few rows that adds the residual, and the norm."
    )
    _register_product(op, rms, "gluon_gemv", "The same for up to 16 rows, by tensor cores that read the weight.")
    _register_product(op, rms, "triton_skinny", "The same for up to 64 rows, with tensor cores.")


def _register_product(op: Op, rms: bool, name: str, description: str) -> None:
    product_of = linear.impls[name]

    def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any) -> list[str]:
        reasons = product_of.why_not(x, weight, bias, "none", residual)
        return list(dict.fromkeys(reasons + triton_norm_why_not(residual, *norm[:-2])))

    def configs(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any) -> list[Any]:
        assert product_of.configs is not None
        return list(product_of.configs(x, weight, bias, "none", residual))

    def impl(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        from burnish.kernels.norms import layer_norm, rms_norm

        *vectors, eps, keep_sum = norm
        total = product_of.fn(x, weight, bias, "none", residual, config=config)
        kernel: Any = rms_norm if rms else layer_norm
        return kernel(total, *vectors, eps), total if keep_sum else total.new_empty(0)

    impl.__doc__ = description
    op.impl(name, why_not=why_not, configs=configs)(_taking(op, impl, "config"))


def register_whole(op: Op) -> None:
    """Impls for many rows: `linear`'s products of all of K at once, then the addition and the layer norm in one."""
    _register_whole(
        op, "triton_whole", "triton", "A product of all of K at once for many rows, then addition and norm."
    )
    _register_whole(op, "triton_tma", "triton_tma", "The same, with a persistent kernel that copies tiles by TMA.")
    _register_whole(op, "gluon_whole", "gluon", "The same, with a Gluon kernel for Hopper.")


def _register_whole(op: Op, name: str, product_name: str, description: str) -> None:
    product_of = linear.impls[product_name]

    def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any) -> list[str]:
        reasons = product_of.why_not(x, weight, bias) + triton_norm_why_not(residual, *norm[:-2])
        rows = x.numel() // max(1, x.shape[-1])
        if rows < FEWEST_WHOLE:
            reasons.append(f"x has {rows} rows; the product of all of K at once is made for {FEWEST_WHOLE} and more")
        return list(dict.fromkeys(reasons))

    def configs(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any) -> list[Any]:
        assert product_of.configs is not None
        return list(product_of.configs(x, weight, bias, "none", None))

    def impl(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        *norm: Any,
        config: Any = None,
        live_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        from burnish.kernels.norms import add_layer_norm

        norm_weight, norm_bias, eps, keep_sum = norm
        product = product_of.fn(x, weight, bias, config=config, live_rows=live_rows)
        return add_layer_norm(product, residual, norm_weight, norm_bias, eps, keep_sum, live_rows=live_rows)

    impl.__doc__ = description
    op.impl(name, why_not=why_not, configs=configs, live_rows=True)(_taking(op, impl, "config", "live_rows"))


def register_gluon_fused(op: Op, *, rms: bool) -> None:
    """An Impl that is one kernel."""

    def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm: Any) -> list[str]:
        reasons = triton_norm_why_not(residual, bias, *norm[:-2]) + wgmma_reasons(x, (weight,)) + hopper_why_not(x)
        if not residual.is_contiguous() or not copyable(residual, residual.shape[-1], 1):
            reasons.append(
                f"residual has strides {residual.stride()}; it must be contiguous, its rows a multiple of 16 bytes"
            )
        if not reasons and not configs(x, weight):
            reasons.append(f"rows of {weight.shape[0]} entries are more tiles than the device has multiprocessors")
        return list(dict.fromkeys(reasons))

    def configs(x: Tensor, weight: Tensor, *rest: Any) -> list[Any]:
        from burnish.kernels.linear_norm_wgmma import linear_norm_wgmma_configs
        from burnish.kernels.matmul_configs import Product

        return linear_norm_wgmma_configs(Product.of(x, weight))

    def gluon_fused(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        *norm: Any,
        config: Any = None,
        live_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One Gluon kernel for Hopper, whose programs exchange what they know of rows that they share."""
        from burnish.kernels.linear_norm_wgmma import linear_norm_wgmma

        *vectors, eps, keep_sum = norm
        scale, shift = [*vectors, None][:2]  # an RMS norm has no bias
        return linear_norm_wgmma(x, weight, bias, residual, scale, shift, eps, rms, keep_sum, config, live_rows)

    # Of RMS norms no other Impl is told how many rows are wanted, and on another GPU none would be.
    options = ("config",) if rms else ("config", "live_rows")
    op.impl("gluon_fused", why_not=why_not, configs=configs, live_rows=not rms)(_taking(op, gluon_fused, *options))


def _taking(op: Op, fn: Callable[..., Any], *options: str) -> Callable[..., Any]:
    """The function, which takes all of the Op's arguments by position, as one that is called like the Op; its options
    are None by default."""
    parameters = list(op.signature.parameters.values())
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in options]

    @functools.wraps(fn)
    def taking(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in options if name in kwargs}
        return fn(*(args if len(args) == len(parameters) else op.bind(*args, **kwargs)), **given)

    taking.__signature__ = op.signature.replace(parameters=[*parameters, *extra])  # type: ignore[attr-defined]
    return taking
