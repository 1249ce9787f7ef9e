"""What the Ops share that start a branch: a norm, and the product that alone reads it."""

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

MOST_ROWS = 16  # each program normalizes all rows anew
_FAMILIES = ("gemv", "skinny")


@dataclass(frozen=True)
class Way:
    """How an Impl computes a norm and then a product.

    `run` takes the norm's arguments, x first, those of the product but its x, and a config. `why_not` and `configs`
    take all arguments of the Op, which are the same ones in a row.
    """

    description: str
    run: Callable[[tuple[Any, ...], tuple[Any, ...], Any], Tensor]
    why_not: Callable[..., list[str]]
    configs: Callable[..., Sequence[Any]] | None


def check_norm_vectors(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None = None) -> None:
    check_vector("norm_weight", norm_weight, x.shape[-1], "x's last dimension")
    check_vector("norm_bias", norm_bias, x.shape[-1], "x's last dimension")


def cost_of(norm: Op, product: Op, norm_args: tuple[Any, ...], product_args: tuple[Any, ...]) -> Cost:
    """The norm's and the product's, less the norm's result, which is neither written nor read."""
    x = norm_args[0]
    both = norm.cost(*norm_args) + product.cost(x, *product_args)
    return Cost(both.flops, both.bytes - 2 * x.numel() * x.element_size())


def ways(norm: Op, product: Op) -> dict[str, Way]:
    """Every Impl of the Op that is `product` of `norm`, by name, in order of preference."""
    name = product.name
    found = {
        "onednn": _apart(
            norm, "vector_norm" if norm is rms_norm else "torch", product, "onednn", f"The norm, then {name}'s onednn."
        ),
        "torch": _apart(norm, "torch", product, "torch", f"PyTorch's own norm, then {name}'s torch."),
        "triton_torch": _apart(
            norm, "triton", product, "torch", f"The norm's Triton kernel, then {name}'s torch.", of_norm=True
        ),
    }
    for family in _FAMILIES:
        kernel = f"triton_{family}"
        description = f"The norm's Triton kernel, then {name}'s {kernel}."
        found[f"triton_then_{family}"] = _apart(norm, "triton", product, kernel, description)
    for family in _FAMILIES:
        found[f"triton_{family}"] = _fused(norm, product, family)
    return found


def _apart(norm: Op, norm_impl: str, product: Op, product_impl: str, description: str, of_norm: bool = False) -> Way:
    """By an Impl of each, one after the other. The configs are the norm's or else the product's; the other of the two
    runs by its first."""
    first, second, count = norm.impls[norm_impl], product.impls[product_impl], len(norm.signature.parameters)

    def run(norm_args: tuple[Any, ...], product_args: tuple[Any, ...], config: Any) -> Tensor:
        given = {} if config is None else {"config": config}
        normed = first.fn(*norm_args, **(given if of_norm else {}))
        out: Tensor = second.fn(normed, *product_args, **({} if of_norm else given))
        return out

    def split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return args[:count], product.bind(empty_contiguous(args[0]), *args[count:])

    def why_not(*args: Any) -> list[str]:
        norm_args, product_args = split(args)
        return list(dict.fromkeys(first.reasons(*norm_args) + second.reasons(*product_args)))

    def configs(*args: Any) -> Sequence[Any]:
        norm_args, product_args = split(args)
        chosen = first.configs if of_norm else second.configs
        assert chosen is not None
        return chosen(*(norm_args if of_norm else product_args))

    has_configs = (first if of_norm else second).configs is not None
    return Way(description, run, why_not, configs if has_configs else None)


def _fused(norm: Op, product: Op, family: str) -> Way:
    """By the kernels of that family, which normalize x on its way into the product."""
    impl, count = product.impls[f"triton_{family}"], len(norm.signature.parameters)

    def why_not(*args: Any) -> list[str]:
        x, rows = args[0], args[0].numel() // max(1, args[0].shape[-1])
        reasons = impl.why_not(x, *args[count:])
        if rows > MOST_ROWS:
            reasons.append(f"x has {rows} rows, each of which every program normalizes; up to {MOST_ROWS} it pays")
        vectors = {v.dtype for v in args[1 : count - 1] if v is not None}
        for dtype in sorted(vectors - {*HALF_TYPES, torch.float32}, key=str):
            reasons.append(f"the norm's weight or bias is {dtype}; the kernel takes float16, bfloat16 and float32")
        return reasons

    def configs(*args: Any) -> Sequence[Any]:
        from burnish.kernels.matmul_configs import Product
        from burnish.kernels.skinny import fits_normed

        assert impl.configs is not None
        x, gated = args[0], product is gated_mlp
        found = impl.configs(*product.bind(x, *args[count:]))
        if family != "skinny":
            return found
        sizes = Product.of(x, args[count], gated)
        return [config for config in found if fits_normed(config.gate if gated else config, sizes)]

    def run(norm_args: tuple[Any, ...], product_args: tuple[Any, ...], config: Any) -> Tensor:
        from burnish.kernels import gated
        from burnish.kernels.families import FAMILIES
        from burnish.kernels.norm_prologue import Norm

        x, weight, *bias, eps = norm_args
        normed = Norm(weight, bias[0] if bias else None, eps, rms=norm is rms_norm)
        if product is gated_mlp:
            gate_up, down, gate_up_bias, down_bias, activation = product_args
            return gated.gated_mlp(
                family, x, gate_up, down, gate_up_bias, down_bias, activation, True, config, normed
            )  # fmt: skip
        return FAMILIES[family].multiply(x, *product_args, norm=normed, config=config)

    description = (
        f"{product.name}'s triton_{family} for up to {MOST_ROWS} rows, normalized on their way into the product."
    )
    return Way(description, run, why_not, configs)
