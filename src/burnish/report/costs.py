"""What a node of a graph costs at the least: floating-point operations, bytes, and what kind of work that is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from burnish import ops
from burnish.graph.show import describe_value
from burnish.lower import op_of
from burnish.op import Cost, Op

Kind = Literal["product", "attention", "biased attention", "pass", "free"]
"""A matrix product; attention, without or with a bias or mask of all scores; a pass over memory; nothing that a device
would have to do."""

_PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "bilinear", "tensordot"}
    | {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "convolution"}
)
_ATTENTION = frozenset({"attention", "cached_attention"})
# Of what they look up in, they read no more than they write.
_LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "take", "take_along_dim"})
# Of what they are given they ask the shape only.
_MAKERS = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}) | frozenset(
    {"new_empty", "new_zeros", "new_ones", "new_full", "sym_size", "sym_stride", "sym_numel"}
)
# They are a view, say which dtype a result has, or make room for one.
_IDLE = frozenset({"_unsafe_view", "promote_types", "result_type"}) | frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)


@dataclass(frozen=True)
class Work:
    """One node at the sizes of one call.

    inputs, output: "float32[2, 8]". dtype: of the first floating-point result, else of the first tensor.
    flops, bytes: what it has to compute, and to read and write, each tensor once. written: its results' bytes.
    """

    kind: Kind
    flops: float
    bytes: float
    written: float
    inputs: tuple[str, ...]
    output: str
    dtype: torch.dtype


def work_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Work:
    """The work of the call `target(*args, **kwargs)`, an ATen overload or an Op, that gave `result`. Real or fake
    tensors; an Op counts by its own cost.

    A result that shares the memory of an input is free: a view, or a copy that was none. A tensor whose elements are
    repeated by strides of 0 counts once. FLOPs of matrix products and convolutions are torch's own count, attention's
    are the Op's; everything else counts one for each element of its largest tensor.
    """
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    floating = [tensor for tensor in (*made, *given) if tensor.is_floating_point()]
    dtype = next((tensor.dtype for tensor in (*floating, *made, *given)), torch.float32)
    op, name = op_of(target), _name(target)
    kind: Kind
    if op is not None:
        kind, cost = _kind(op, op.bind(*args, **kwargs)), _op_cost(op, args, kwargs, given, made)
    elif not made or (_shares_memory(made, given) and not target._schema.is_mutable):
        kind, cost = "free", Cost(0, 0)
    elif name == "scaled_dot_product_attention":
        kind, cost = _sdpa(*args, **kwargs)
    elif name in _PRODUCTS:
        kind, cost = "product", Cost(_torch_flops(target, args, kwargs), _bytes(given) + _bytes(made))
    else:
        elements = max(tensor.numel() for tensor in (*given, *made)) if name not in _LOOKUPS else 0
        kind, cost = "pass", Cost(elements, _read(name, given, made) + _bytes(made))
    inputs = tuple(map(describe_value, given))
    return Work(kind, float(cost.flops), float(cost.bytes), float(_bytes(made)), inputs, describe_value(result), dtype)


def is_view(target: Any) -> bool:
    """Whether the operator only looks at its input in another way, by its schema."""
    returns = list(target._schema.returns) if isinstance(target, torch._ops.OpOverload) else []
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def computes_nothing(target: Any) -> bool:
    """Whether the operator is a view, or only makes room for a result."""
    return is_view(target) or _name(target) in _IDLE


def _name(target: Any) -> str:
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _kind(op: Op, args: Sequence[Any]) -> Kind:
    if op.name in _ATTENTION:
        bias = args[list(op.signature.parameters).index("bias")]
        return "attention" if bias is None else "biased attention"
    return "product" if any(isinstance(args[i], Tensor) and args[i].dim() > 1 for i in op.weights) else "pass"


def _op_cost(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor], made: Sequence[Tensor]
) -> Cost:
    try:
        return op.cost(*args, **kwargs)
    except (RuntimeError, TypeError):  # it asks a fake tensor for a value: how many tokens a KV cache holds
        return Cost(0, _bytes(given) + _bytes(made))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Kind, Cost]:
    kind: Kind = "attention" if attn_mask is None else "biased attention"
    if query.dim() == 3:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    return kind, ops.attention.cost(query, key, value, attn_mask, None, is_causal)


def _torch_flops(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """torch's count, of the same call on tensors without memory."""

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    args, kwargs = pytree.tree_map(bare, (tuple(args), dict(kwargs)))
    with FlopCounterMode(display=False) as counter, contextlib.suppress(NotImplementedError):
        target(*args, **kwargs)
    return counter.get_total_flops()


def _read(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    if name in _MAKERS:
        return 0
    if name in _LOOKUPS:
        indices = [tensor for tensor in given if not tensor.is_floating_point() and tensor is not given[0]]
        return _bytes(made) + _bytes(indices)
    return _bytes(given)


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of distinct elements: what an expanded tensor repeats lies in memory once."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride else 1
        total += elements * tensor.element_size() if tensor.numel() else 0
    return total


def _shares_memory(made: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    taken = {tensor.untyped_storage()._cdata for tensor in given}
    return bool(taken) and all(tensor.untyped_storage()._cdata in taken for tensor in made)
