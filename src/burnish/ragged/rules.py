"""Which operators keep tokens apart: what they compute for one token depends on that token alone.

Each rule gets a node of the padded graph and says None, or why its tokens are not kept apart. `Dims` says which of a
value's dimensions count rows of the batch and positions; an operator may change, reduce or mix the others only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from burnish.graph._words import words
from burnish.lower import op_of
from burnish.rewrites.rewrite import arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Dims:
    """Of one value's dimensions those that count rows of the batch, positions, or both at once; None where there are
    none."""

    row: int | None = None
    position: int | None = None
    both: int | None = None

    @property
    def of_tokens(self) -> tuple[int, ...]:
        return tuple(d for d in (self.row, self.position, self.both) if d is not None)

    @property
    def has_positions(self) -> bool:
        return self.position is not None or self.both is not None


class NotTokens(Exception):
    """A value's dimensions are not understood; the message says which."""


@dataclass(frozen=True)
class Sizes:
    """The symbols of a padded graph's batch and length."""

    rows: sympy.Symbol
    length: sympy.Symbol

    def dims(self, value: Any) -> Dims:
        """NotTokens for sizes in which the two symbols stand otherwise than alone or multiplied with each other."""
        found: dict[str, int] = {}
        for i, size in enumerate(value.shape):
            expression = expression_of(size)
            if not self.is_in(expression):
                continue
            kind = {self.rows: "row", self.length: "position", self.rows * self.length: "both"}.get(expression)
            if kind is None or kind in found or (kind == "both" and found) or "both" in found:
                raise NotTokens(f"its shape {tuple(map(str, value.shape))} is not one of tokens")
            found[kind] = i
        return Dims(**found)

    def is_in(self, expression: sympy.Expr) -> bool:
        return bool(expression.free_symbols & {self.rows, self.length})


def expression_of(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


Rule = Callable[[fx.Node, Dims, Callable[[Any], Dims]], "str | None"]
"""Takes the node, its first tensor's Dims, and a function that gives any argument's."""

# Ops that compute each vector of the last dimension by itself.
_OPS = frozenset(
    words(
        """
        add_layer_norm add_rms_norm embedding embedding_layer_norm gated_mlp layer_norm linear linear_add_layer_norm
        linear_add_rms_norm linear_rope rms_norm rms_norm_gated_mlp rms_norm_linear rope rope_qk
        """
    )
)


def why_mixed(node: fx.Node, dims_of: Callable[[Any], Dims]) -> str | None:
    """Why the node does not compute each token by itself, as far as is known; None where it does."""
    first = next((n for n in node.all_input_nodes if dims_of(n).of_tokens), None)
    dims = Dims() if first is None else dims_of(first)
    op = op_of(node.target)
    if op is not None:
        if op.name not in _OPS:
            return f"{op.name} is not known to keep tokens apart"
        ends = [n for n in node.all_input_nodes if _last(n) in dims_of(n).of_tokens]
        return f"{op.name} works along the tokens" if ends else None
    if node.target in _RULES:
        return _RULES[node.target](node, dims, dims_of)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or getattr(node.target, "__name__", "") == "getitem":
        return None
    return f"{_name(node)} is not known to keep tokens apart"


def picks(node: fx.Node, dims_of: Callable[[Any], Dims]) -> bool:
    """Whether the node takes tokens by their positions: `h[:, 0]`."""
    if node.target not in (aten.select.int, aten.slice.Tensor, aten.index.Tensor, aten.index_select.default):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and dims_of(source).has_positions and not dims_of(node).has_positions


def is_vector(node: fx.Node, dims_of: Callable[[Any], Dims]) -> bool:
    """Whether it is an int64 for each place, (B, S), or for each position, (1, S) or (S,)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() not in (1, 2):
        return False
    dims = dims_of(node)
    if value.dim() == 1:
        return dims == Dims(position=0)
    return dims == Dims(row=0, position=1) or (dims == Dims(position=1) and expression_of(value.shape[0]) == 1)


def _last(node: fx.Node) -> int:
    found = node.meta.get("val")
    return found.dim() - 1 if isinstance(found, Tensor) else -1


def _name(node: fx.Node) -> str:
    return str(node.target).rsplit(".", 1)[0].removeprefix("aten.")


def _apart(node: fx.Node, dims: Dims, dims_of: Callable[[Any], Dims]) -> str | None:
    return None


def _along(node: fx.Node, dims: Dims, dims_of: Callable[[Any], Dims]) -> str | None:
    """For operators along `dim` (one, several, or None for all)."""
    args = arguments(node)
    source = next(a for a in args.values() if isinstance(a, (fx.Node, list, tuple)))
    source = source[0] if isinstance(source, (list, tuple)) else source
    rank, dim = _last(source) + 1, args.get("dim", args.get("dims"))
    dims = dims_of(source)
    given = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    if not {d % max(rank, 1) for d in given} & set(dims.of_tokens):
        return None
    whole = node.target is aten.slice.Tensor and args["start"] in (0, None) and args["step"] == 1
    if whole and dims == dims_of(node):
        return None
    return f"{_name(node)} is along the tokens"


def _reshaped(node: fx.Node, dims: Dims, dims_of: Callable[[Any], Dims]) -> str | None:
    """Rows and positions keep their order, and what lies between them its size."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = (_between(n.meta["val"], dims_of(n)) for n in (source, node))
    return None if before == after else f"{_name(node)} does not keep each token's entries together"


def _between(value: Tensor, dims: Dims) -> list[Any]:
    """In the order in memory: "row", "position", and the number of entries between them."""
    parts: list[Any] = [sympy.Integer(1)]
    for i, size in enumerate(value.shape):
        names = {dims.row: ["row"], dims.position: ["position"], dims.both: ["row", "position"]}.get(i)
        if names is None:
            parts[-1] = parts[-1] * expression_of(size)
        else:
            for name in names:
                parts += [name, sympy.Integer(1)]
    return parts


def _product(node: fx.Node, dims: Dims, dims_of: Callable[[Any], Dims]) -> str | None:
    """matmul(tokens, weight)."""
    factors = [a for a in node.args if isinstance(a, fx.Node)]
    tokens, weight = factors[-2:] if node.target is aten.addmm.default else factors[:2]
    if any(dims_of(n).of_tokens for n in node.all_input_nodes if n is not tokens) or weight.meta["val"].dim() > 2:
        return f"{_name(node)} multiplies tokens with each other"
    return "its sum is along the tokens" if _last(tokens) in dims_of(tokens).of_tokens else None


def _looked_up(node: fx.Node, dims: Dims, dims_of: Callable[[Any], Dims]) -> str | None:
    table = node.args[0]
    return f"{_name(node)} looks up tokens" if dims_of(table).of_tokens else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default,
            aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
            aten._to_copy.default, aten.alias.default, aten.detach.default, aten.dropout.default,
            aten.type_as.default, aten.masked_fill.Scalar,
        ),
        _apart,
    ),
    **dict.fromkeys(
        (
            aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.cat.default,
            aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.unbind.int, aten.softmax.int,
            aten.log_softmax.int, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var.correction,
            aten.argmax.default,
        ),
        _along,
    ),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
         aten.unflatten.int),
        _reshaped,
    ),
    **dict.fromkeys((aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default), _product),
    **dict.fromkeys((aten.embedding.default, aten.index.Tensor), _looked_up),
}  # fmt: skip
