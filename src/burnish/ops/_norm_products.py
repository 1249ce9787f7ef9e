"""What the Ops share that start a branch: an RMS norm, and the product that alone reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Op
from burnish.ops._common import HALF_TYPES, check_vector
from burnish.ops._norms import empty_contiguous
from burnish.ops.gated_mlp import gated_mlp
from burnish.ops.rms_norm import rms_norm

NormArgs = tuple[Tensor, Tensor | None, float]  # x, the norm's weight, eps
_NORM_ARGS = 3


@dataclass(frozen=True)
class Way:
    """How an Impl computes a norm and then a product.

    `run` takes the norm's arguments, those of the product but its x, and a config. `why_not` and `configs` take all
    arguments of the Op, which are the same ones in a row.
    """

    description: str
    run: Callable[[NormArgs, tuple[Any, ...], Any], Tensor]
    why_not: Callable[..., list[str]]
    configs: Callable[..., Sequence[Any]] | None


def check_norm_weight(x: Tensor, norm_weight: Tensor | None) -> None:
    check_vector("norm_weight", norm_weight, x.shape[-1], "x's last dimension")


def cost_of(product: Op, norm_args: NormArgs, product_args: tuple[Any, ...]) -> Cost:
    """The norm's and the product's, less the norm's result, which is neither written nor read."""
    x = norm_args[0]
    both = rms_norm.cost(*norm_args) + product.cost(x, *product_args)
    return Cost(both.flops, both.bytes - 2 * x.numel() * x.element_size())


def ways(product: Op) -> dict[str, Way]:
    """Every Impl of the Op that is `product` of `rms_norm`, by name, in order of preference."""
    return {
        "onednn": _apart("vector_norm", product, "onednn"),
        "torch": _apart("torch", product, "torch"),
        "triton_torch": _apart("triton", product, "torch"),
        "triton_then_gemv": _apart("triton", product, "triton_gemv"),
        "triton_then_skinny": _apart("triton", product, "triton_skinny"),
        "triton_gemv": _fused(product),
    }


def _apart(norm_impl: str, product: Op, product_impl: str) -> Way:
    """By an Impl of each, one after the other. The configs are the product's, or where it has none the norm's; the
    norm otherwise runs by its first."""
    first, second = rms_norm.impls[norm_impl], product.impls[product_impl]
    of_product = second.configs is not None

    def run(norm_args: NormArgs, product_args: tuple[Any, ...], config: Any) -> Tensor:
        given = {} if config is None else {"config": config}
        normed = first.fn(*norm_args, **({} if of_product else given))
        out: Tensor = second.fn(normed, *product_args, **(given if of_product else {}))
        return out

    def split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return args[:_NORM_ARGS], product.bind(empty_contiguous(args[0]), *args[_NORM_ARGS:])

    def why_not(*args: Any) -> list[str]:
        norm_args, product_args = split(args)
        return list(dict.fromkeys(first.reasons(*norm_args) + second.reasons(*product_args)))

    def configs(*args: Any) -> Sequence[Any]:
        norm_args, product_args = split(args)
        if second.configs is not None:
            return second.configs(*product_args)
        assert first.configs is not None
        return first.configs(*norm_args)

    description = f"rms_norm's {norm_impl}, then {product.name}'s {product_impl}."
    return Way(description, run, why_not, configs if of_product or first.configs is not None else None)


def _fused(product: Op) -> Way:
    """By the kernels for a few rows, which normalize x on its way into the product."""
    impl = product.impls["triton_gemv"]

    def why_not(*args: Any) -> list[str]:
        x, norm_weight, _, *product_args = args
        reasons = impl.why_not(x, *product_args)
        if norm_weight is not None and norm_weight.dtype not in (*HALF_TYPES, torch.float32):
            reasons.append(f"norm_weight is {norm_weight.dtype}; the kernel takes float16, bfloat16 and float32")
        return reasons

    def configs(*args: Any) -> Sequence[Any]:
        assert impl.configs is not None
        return impl.configs(*product.bind(args[0], *args[_NORM_ARGS:]))

    def run(norm_args: NormArgs, product_args: tuple[Any, ...], config: Any) -> Tensor:
        from burnish.kernels.gated import gated_mlp as multiply_gated
        from burnish.kernels.gemv import Norm, gemv

        x, norm_weight, eps = norm_args
        norm = Norm(norm_weight, eps)
        if product is gated_mlp:
            gate_up, down, gate_up_bias, down_bias, activation = product_args
            return multiply_gated(
                "gemv", x, gate_up, down, gate_up_bias, down_bias, activation, True, config, norm
            )  # fmt: skip
        weight, bias, activation = product_args
        return gemv(x, weight, bias, activation, norm=norm, config=config)

    description = f"{product.name}'s triton_gemv, by whose kernel a few rows of x are normalized on their way."
    return Way(description, run, why_not, configs)
