"""The product of queries, keys and values, their rotary position embedding, and the cache's new rows, in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import HALF_TYPES, nbytes
from burnish.ops.linear import linear
from burnish.ops.rope import rope_tables
from burnish.ops.rope_append import rope_append

Heads = tuple[Tensor, Tensor, Tensor]


def _heads(product: Tensor, k_cache: Tensor, v_cache: Tensor) -> Heads:
    """q, k and v as (B, H, S, D), views of the product (B, S, N): what the caches have no heads for is q's."""
    heads, d, dv = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    sizes = ((product.shape[-1] - heads * (d + dv)) // d, d), (heads, d), (heads, dv)
    parts = product.split([count * width for count, width in sizes], dim=-1)
    q, k, v = (part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True))
    return q, k, v


def _empty_heads(x: Tensor, weight: Tensor, k_cache: Tensor, v_cache: Tensor) -> Heads:
    """Of the heads' shapes, dtype and device, with the memory of one entry."""
    return _heads(x.new_empty(()).expand(*x.shape[:2], weight.shape[0]), k_cache, v_cache)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> None:
    linear.check(x, weight, bias)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, sequence, K)")
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
    heads = _empty_heads(x, weight, k_cache, v_cache)
    rope_append.check(*heads, cos, sin, k_cache, v_cache, lengths, interleaved)


def _cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> Cost:
    product, heads = linear.cost(x, weight, bias), _empty_heads(x, weight, k_cache, v_cache)
    turning = rope_append.cost(*heads, cos, sin, k_cache, v_cache, lengths, interleaved)
    return Cost(product.flops + turning.flops, product.bytes + nbytes(cos, sin, lengths))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def of(b: int, s: int, depth: int, hq: int, h: int, most: int, d: int, dv: int) -> tuple[tuple[Tensor, ...], ...]:
        """x, weight and bias, and the caches."""
        rows = hq * d + h * (d + dv)
        weight = tensor(rows, depth, seed=1) / depth**0.5
        caches = tensor(b, h, most, d, seed=3), tensor(b, h, most, dv, seed=4)
        return (tensor(b, s, depth, seed=0), weight, tensor(rows, seed=2)), caches

    def tables(length: int, width: int, offset: int = 0, interleaved: bool = False) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, interleaved))

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    one, one_caches = of(1, 1, 96, 4, 2, 40, 32, 32)
    few, few_caches = of(2, 3, 96, 3, 1, 24, 20, 20)
    each = [torch.stack(pair) for pair in zip(tables(3, 20, 19), tables(3, 20, 22), strict=True)]
    yield Sample("one token", (*one[:2], None, *tables(1, 32, 11), *one_caches, torch.tensor(11, device=device)))
    yield Sample("a table and a length for each", (*few, *each, *few_caches, lengths(19, 22)))
    turned = (*tables(3, 20, 4, True), *few_caches, lengths(4, dtype=torch.int32), True)
    yield Sample("interleaved", (few[0].transpose(0, 1).contiguous().transpose(0, 1), *few[1:], *turned))
    tables32 = (t[None].float() for t in tables(3, 20, 23))
    yield Sample("float32 tables, not all fit", (*few[:2], None, *tables32, *few_caches, lengths(23)))
    part, part_caches = of(2, 9, 64, 3, 1, 20, 24, 16)
    yield Sample("18 rows, partial", (*part, *tables(9, 10, 2), *part_caches, lengths(2)))
    large, large_caches = of(1, 1, 1024, 4, 1, 256, 64, 64)
    yield Sample("1x1024, h4/1 into 256x64", (*large, *tables(1, 64, 200), *large_caches, lengths(200)))


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q = _empty_heads(x, weight, k_cache, v_cache)[0]
    q = x.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
    return q, torch.empty_like(k_cache), torch.empty_like(v_cache)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"k_cache": 1, "v_cache": 2})
def linear_rope_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_append` of the heads of q, k and v that `x @ weight.T + bias` has side by side: `(q, k_cache, v_cache)`.

    Shapes: x (B, S, K); weight (Hq * D + Hkv * (D + Dv), K), of any strides; bias its rows' number or None; cos and sin
    as `rope` takes them, of the new tokens' positions; k_cache (B, Hkv, Lmax, D), v_cache (B, Hkv, Lmax, Dv) and
    lengths as `append_kv` takes them. q is (B, Hq, S, D), stored as (B, S, Hq, D); each cache is laid out in memory as
    torch.empty_like of its input.
    Positions: token i goes to position lengths + i of the caches; what would lie past Lmax is dropped.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: x, weight, bias and the caches the same floating one; cos and sin floating, they may differ. The product is
    rounded to x's dtype, rotated from there in float32 (float64 for float64), and rounded; an Impl may leave the first
    rounding out.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes.
    Source: Su et al., "RoFormer", arXiv:2104.09864; the cache as in Pope et al., "Efficiently Scaling Transformer
    Inference", arXiv:2211.05102.
    """
    q, k, v = _heads(F.linear(x, weight, bias), k_cache, v_cache)
    return rope_append.reference(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved)


# --- one after the other --------------------------------------------------------------------------


def _torch_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
) -> list[str]:
    heads = _empty_heads(x, weight, k_cache, v_cache)
    return rope_append.impls["torch"].why_not(*heads, cos, sin, k_cache, v_cache, lengths, interleaved)


def _torch_in_place(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _heads(F.linear(x, weight, bias), k_cache, v_cache)
    append = rope_append.impls["torch"].in_place
    assert append is not None
    return append(*heads, cos, sin, k_cache, v_cache, lengths, interleaved)


@linear_rope_append.impl("torch", why_not=_torch_why_not, in_place=_torch_in_place)
def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """F.linear, then `rope_append`'s torch."""
    return _torch_in_place(x, weight, bias, cos, sin, k_cache.clone(), v_cache.clone(), lengths, interleaved)


InPlace = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _register(
    name: str,
    description: str,
    why_not: Callable[..., list[str]],
    configs: Callable[..., Sequence[Any]],
    run: InPlace,
) -> None:
    """An Impl with configs, by `run`, which writes into the caches that it is given."""

    def impl(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        interleaved: bool = False,
        *,
        config: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        caches = k_cache.clone(), v_cache.clone()
        return run(x, weight, bias, cos, sin, *caches, lengths, interleaved, config=config)

    impl.__doc__ = description
    linear_rope_append.impl(name, why_not=why_not, configs=configs, in_place=run)(impl)


def _register_apart(name: str, product_impl: str) -> None:
    """An Impl by `linear`'s of that name, and then `rope_append`'s kernel."""
    product, append = linear.impls[product_impl], rope_append.impls["triton"]

    def why_not(*args: Any) -> list[str]:
        x, weight, bias, cos, sin, k_cache, v_cache, *rest = args
        heads = _empty_heads(x, weight, k_cache, v_cache)
        reasons = product.why_not(x, weight, bias) + append.why_not(*heads, cos, sin, k_cache, v_cache, *rest)
        return list(dict.fromkeys(reasons))

    def configs(*args: Any) -> Sequence[Any]:
        x, weight, bias, cos, sin, k_cache, v_cache, *rest = args
        if product.configs is not None:
            return product.configs(*product.bind(x, weight, bias))
        assert append.configs is not None
        return append.configs(*_empty_heads(x, weight, k_cache, v_cache), cos, sin, k_cache, v_cache, *rest)

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        interleaved: bool = False,
        config: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_product, by_append = ({"config": config}, {}) if product.configs is not None else ({}, {"config": config})
        heads = _heads(product.fn(x, weight, bias, **by_product), k_cache, v_cache)
        assert append.in_place is not None
        return append.in_place(*heads, cos, sin, k_cache, v_cache, lengths, interleaved, **by_append)

    _register(name, f"`linear`'s {product_impl}, then `rope_append`'s triton.", why_not, configs, run)


for _name, _product in (("torch_triton", "torch"), ("triton_skinny", "triton_skinny"), ("triton_apart", "triton_gemv")):
    _register_apart(_name, _product)


# --- in one kernel --------------------------------------------------------------------------------


def _fused_kernel(name: str) -> tuple[Callable[..., Tensor], Callable[..., Sequence[Any]]]:
    """The kernel's launcher, and its configs."""
    if name == "gluon_gemv":
        from burnish.kernels.gemv_mma_append import gemv_mma_append, gemv_mma_append_configs

        return gemv_mma_append, gemv_mma_append_configs
    from burnish.kernels.gemv_append import gemv_append, gemv_append_configs

    return gemv_append, gemv_append_configs


def _register_fused(name: str, description: str) -> None:
    """An Impl whose kernel is that of `linear`'s of this name, with an epilogue of its own."""
    product = linear.impls[name]

    def why_not(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        interleaved: bool,
    ) -> list[str]:
        reasons = product.why_not(x, weight, bias)
        if k_cache.numel() == 0:
            reasons.append("an input is empty")
        width, v_width = k_cache.shape[3], v_cache.shape[3]
        if cos.shape[-1] != width:
            reasons.append(f"cos and sin have {cos.shape[-1]} columns; the kernel rotates whole heads, of {width}")
        if v_width != width:
            reasons.append(f"heads of v have {v_width} entries, those of k {width}; the kernel takes one width")
        for table_name, table in (("cos", cos), ("sin", sin)):
            if table.dtype not in (*HALF_TYPES, torch.float32):
                reasons.append(f"{table_name} is {table.dtype}; the kernel takes float16, bfloat16 and float32")
        return list(dict.fromkeys(reasons))

    def configs(x: Tensor, weight: Tensor, *args: Any) -> Sequence[Any]:
        found: Sequence[Any] = _fused_kernel(name)[1](x, weight)
        return found

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        interleaved: bool = False,
        config: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        append = _fused_kernel(name)[0]
        return append(x, weight, bias, cos, sin, k_cache, v_cache, lengths, interleaved, config), k_cache, v_cache

    _register(name, description, why_not, configs, run)


_register_fused(
    "triton_gemv",
    "A Triton kernel for a few rows of x, which streams the weight, and rotates and appends in its epilogue.",
)
_register_fused("gluon_gemv", "The same in Gluon for up to 16 rows, which reads the weight right into tensor cores.")
