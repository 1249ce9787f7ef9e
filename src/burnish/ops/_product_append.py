"""What the Ops share that are the product of queries, keys and values, rotation, and a cache's new rows, in one.

Such an Op takes what its product takes, another Op's arguments from x on, and after them cos, sin, k_cache, v_cache,
lengths and interleaved. Without tables (cos and sin are None) nothing is rotated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.op import Cost, Op
from burnish.ops._common import HALF_TYPES, nbytes
from burnish.ops.append_kv import append_kv
from burnish.ops.rope_append import rope_append

Heads = tuple[Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, Tensor]
"""q, and both caches."""
Kernel = tuple[Callable[..., Tensor], Callable[..., Sequence[Any]]]
"""What takes all arguments and a `config`, writes into the caches and returns q; and the configs for all arguments."""
_AFTER_PRODUCT = 6  # arguments


def parted(args: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The product's arguments, and those after them."""
    return tuple(args[:-_AFTER_PRODUCT]), tuple(args[-_AFTER_PRODUCT:])


def _heads(product: Tensor, k_cache: Tensor, v_cache: Tensor) -> Heads:
    """q, k and v as (B, H, S, D), views of the product (B, S, N): what the caches have no heads for is q's."""
    heads, d, dv = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    sizes = ((product.shape[-1] - heads * (d + dv)) // d, d), (heads, d), (heads, dv)
    parts = product.split([count * width for count, width in sizes], dim=-1)
    q, k, v = (part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True))
    return q, k, v


def _empty_heads(args: Sequence[Any]) -> Heads:
    """Of the heads' shapes, dtype and device, with the memory of one entry."""
    (x, weight, *_), (_, _, k_cache, v_cache, _, _) = parted(args)
    return _heads(x.new_empty(()).expand(*x.shape[:2], weight.shape[0]), k_cache, v_cache)


# --- the Op ---------------------------------------------------------------------------------------


def check(product: Op, *args: Any) -> None:
    given, (cos, sin, k_cache, v_cache, lengths, interleaved) = parted(args)
    product.check(*given)
    x, weight = given[:2]
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, sequence, K)")
    if (cos is None) != (sin is None):
        missing, there = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{missing} is None where {there} is given; give both tables, or neither to rotate nothing")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(cache.shape)}; it must be (batch, heads, positions, head_dim)")
    of_k, of_v = (cache.shape[1] * cache.shape[3] for cache in (k_cache, v_cache))
    of_q = weight.shape[0] - of_k - of_v
    if of_q <= 0 or of_q % k_cache.shape[3]:
        raise ValueError(
            f"weight has {weight.shape[0]} rows; they must be heads of {k_cache.shape[3]} for q, and {of_k} and {of_v} "
            "for k and v, as the caches have them"
        )
    q, k, v = _empty_heads(args)
    if cos is None:
        append_kv.check(k_cache, v_cache, k, v, lengths)
    else:
        rope_append.check(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def cost(product: Op, *args: Any) -> Cost:
    given, (cos, sin, _, _, lengths, _) = parted(args)
    of_product = product.cost(*given)
    turning = 0 if cos is None else rope_append.cost(*_empty_heads(args), *args[-_AFTER_PRODUCT:]).flops
    return Cost(of_product.flops + turning, of_product.bytes + nbytes(cos, sin, lengths))


def shape(*args: Any) -> Results:
    x, k_cache, v_cache = args[0], *args[-4:-2]
    q = _empty_heads(args)[0].transpose(1, 2)
    return x.new_empty(q.shape).transpose(1, 2), torch.empty_like(k_cache), torch.empty_like(v_cache)


def appended(
    product: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> Results:
    """What comes after the product (B, S, N), by the references."""
    q, k, v = _heads(product, k_cache, v_cache)
    if cos is None or sin is None:
        return _copied(q), *append_kv.reference(k_cache, v_cache, k, v, lengths)
    return rope_append.reference(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def _copied(q: Tensor) -> Tensor:
    """Stored as (B, S, H, D)."""
    return q.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


# --- Impls: one after the other -------------------------------------------------------------------


def register(
    op: Op,
    name: str,
    description: str,
    why_not: Callable[..., list[str]],
    run: Callable[..., Results],
    configs: Callable[..., Sequence[Any]] | None = None,
) -> None:
    """An Impl by `run`, which takes all arguments, and a `config` where there are some, and writes into the caches."""

    def in_place(*args: Any, **config: Any) -> Results:
        return run(*op.bind(*args), **config)

    def impl(*args: Any, **config: Any) -> Results:
        bound = (arg.clone() if i in op.donates else arg for i, arg in enumerate(op.bind(*args)))
        return run(*bound, **config)

    parameters = list(op.signature.parameters.values())
    if configs is not None:
        parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None))
    impl.__signature__ = op.signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    impl.__doc__ = description
    op.impl(name, why_not=why_not, configs=configs, in_place=in_place)(impl)


def _reasons_after(name: str, args: Sequence[Any]) -> list[str]:
    """Against the Impl of this name of what comes after the product."""
    q, k, v = _empty_heads(args)
    _, (cos, sin, k_cache, v_cache, lengths, interleaved) = parted(args)
    if cos is None:
        return append_kv.impls[name].why_not(k_cache, v_cache, k, v, lengths)
    return rope_append.impls[name].why_not(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


def register_torch(op: Op, product: Op) -> None:
    """The product's torch, then that of what comes after it."""
    multiply, turn, append = product.impls["torch"], rope_append.impls["torch"], append_kv.impls["torch"]

    def why_not(*args: Any) -> list[str]:
        return multiply.why_not(*parted(args)[0]) + _reasons_after("torch", args)

    def run(*args: Any) -> Results:
        given, (cos, sin, k_cache, v_cache, lengths, interleaved) = parted(args)
        q, k, v = _heads(multiply.fn(*given), k_cache, v_cache)
        assert turn.in_place is not None
        assert append.in_place is not None
        if cos is None:
            return _copied(q), *append.in_place(k_cache, v_cache, k, v, lengths)
        results: Results = turn.in_place(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)
        return results

    register(op, "torch", f"`{product.name}`'s torch, then `rope_append`'s or `append_kv`'s.", why_not, run)


def register_apart(op: Op, name: str, product: Op, product_impl: str) -> None:
    """An Impl by the product's of that name, and then the kernel that rotates and appends."""
    multiply = product.impls[product_impl]

    def why_not(*args: Any) -> list[str]:
        return list(dict.fromkeys(multiply.why_not(*parted(args)[0]) + _reasons_after("triton", args)))

    def configs(*args: Any) -> Sequence[Any]:
        if multiply.configs is not None:
            return multiply.configs(*multiply.bind(*parted(args)[0]))
        from burnish.kernels.append import append_configs

        return append_configs(*_empty_heads(args))

    def run(*args: Any, config: Any = None) -> Results:
        from burnish.kernels.append import rope_append as rotate_and_append

        given, after = parted(args)
        _, _, k_cache, v_cache, _, _ = after
        by_product, by_append = ({"config": config}, {}) if multiply.configs is not None else ({}, {"config": config})
        heads = _heads(multiply.fn(*given, **by_product), k_cache, v_cache)
        return rotate_and_append(*heads, *after, **by_append), k_cache, v_cache

    description = f"`{product.name}`'s {product_impl}, then one kernel that rotates and appends."
    register(op, name, description, why_not, run, configs)


# --- Impls: in one kernel -------------------------------------------------------------------------


def register_fused(
    op: Op,
    name: str,
    description: str,
    product: Op,
    kernel: Callable[[], Kernel],
    further_reasons: Callable[..., list[str]] | None = None,
) -> None:
    """An Impl whose kernel is that of the product's of this name, with an epilogue of its own. `kernel` imports it."""
    multiply = product.impls[name]

    def why_not(*args: Any) -> list[str]:
        given, (cos, sin, k_cache, v_cache, _, _) = parted(args)
        reasons = multiply.why_not(*given)
        if k_cache.numel() == 0:
            reasons.append("an input is empty")
        width, v_width = k_cache.shape[3], v_cache.shape[3]
        if cos is not None and cos.shape[-1] != width:
            reasons.append(f"cos and sin have {cos.shape[-1]} columns; the kernel rotates whole heads, of {width}")
        if width % 2:
            reasons.append(f"heads have {width} entries; the kernel takes pairs of them")
        if v_width != width:
            reasons.append(f"heads of v have {v_width} entries, those of k {width}; the kernel takes one width")
        for table_name, table in (("cos", cos), ("sin", sin)):
            if table is not None and table.dtype not in (*HALF_TYPES, torch.float32):
                reasons.append(f"{table_name} is {table.dtype}; the kernel takes float16, bfloat16 and float32")
        return list(dict.fromkeys(reasons + (further_reasons(*args) if further_reasons is not None else [])))

    def configs(*args: Any) -> Sequence[Any]:
        return kernel()[1](*args)

    def run(*args: Any, config: Any = None) -> Results:
        _, (_, _, k_cache, v_cache, _, _) = parted(args)
        return kernel()[0](*args, config=config), k_cache, v_cache

    register(op, name, description, why_not, run, configs)
