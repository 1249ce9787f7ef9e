"""How an Op is differentiated: by passes of its own, as a composition of smaller Ops, or through its reference.

`Op.differentiate(forward, backward)` gives an Op passes of its own, `Op.compose(parts)` a composition. An Op with
neither runs its reference again in the backward pass and differentiates that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from burnish.impl import Result
from burnish.selection import choosing, chosen_impls, without_autocast

Gradients: TypeAlias = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Saved:
    """What a forward pass left for the backward pass.

    Attributes:
        kept: the tensors that the forward pass asked to keep, in its order.
        args: the call's arguments, with None where a tensor was.
        needed: for each argument, whether its gradient is wanted.
    """

    kept: tuple[Any, ...]
    args: tuple[Any, ...]
    needed: tuple[bool, ...]


Forward: TypeAlias = Callable[..., tuple[Result, tuple[Tensor | None, ...]]]
"""Takes the Op's arguments; returns its result, and the tensors to keep: arguments, results and others."""

Backward: TypeAlias = Callable[..., Gradients]
"""Takes a Saved and a gradient for each result (None where there is none); returns one for each argument, or None."""


def by_passes(
    name: str, forward: Forward, backward: Backward, reference: Callable[..., Result]
) -> Callable[..., Result]:
    """A differentiable callable of two passes. The Impls that `use()` names in the forward pass hold for both.

    A second derivative (`create_graph`) goes through the reference where the forward pass kept every tensor that it was
    given, and raises RuntimeError where it did not.
    """

    class ByPasses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Result:
            result, kept = forward(*args)
            ctx.save_for_backward(*kept)
            ctx.set_materialize_grads(False)
            ctx.others = tuple(None if isinstance(a, Tensor) else a for a in args)
            # By argument: where it is in `kept`, -1 for one that was not kept, None for what is no tensor.
            places = {id(k): i for i, k in enumerate(kept) if k is not None}
            ctx.places = tuple(places.get(id(a), -1) if isinstance(a, Tensor) else None for a in args)
            ctx.chosen = chosen_impls()
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            kept = ctx.saved_tensors
            if torch.is_grad_enabled():
                return _twice(ctx, kept, *grads)
            with choosing(ctx.chosen), without_autocast(kept):
                return backward(Saved(kept, ctx.others, ctx.needs_input_grad), *grads)

    def _twice(ctx: Any, kept: tuple[Any, ...], *grads: Tensor | None) -> Gradients:
        if -1 in ctx.places:
            raise RuntimeError(
                f"{name}: its backward pass cannot be differentiated; for second derivatives run the model within "
                f"`burnish.use({name}='reference')`"
            )
        args = tuple(o if p is None else kept[p] for o, p in zip(ctx.others, ctx.places, strict=True))
        return gradients_of(reference, args, ctx.needs_input_grad, grads)

    return ByPasses.apply


def by_recomputing(fn: Callable[..., Result], reference: Callable[..., Result]) -> Callable[..., Result]:
    """`fn` as a differentiable callable, whose backward pass runs `reference`, a differentiable one, again."""

    class ByRecomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Result:
            ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]
            ctx.chosen = chosen_impls()
            return fn(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            tensors = iter(ctx.saved_tensors)
            args = tuple(next(tensors) if other is None else other[0] for other in ctx.others)
            with choosing(ctx.chosen):
                return gradients_of(reference, args, ctx.needs_input_grad, grads)

    return ByRecomputing.apply


def gradients_of(
    fn: Callable[..., Result], args: tuple[Any, ...], needed: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> Gradients:
    """The gradients of `fn(*args)`, run again; differentiable again where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    wanted = [i for i, need in enumerate(needed) if need]
    with torch.enable_grad():
        # A view: the gradient stops here, and a second one still reaches the argument.
        values = [a.view_as(a) if need else a for a, need in zip(args, needed, strict=True)]
        results = fn(*values)
        pairs = zip((results,) if isinstance(results, Tensor) else results, grads, strict=True)
        outputs, weights = zip(*((r, g) for r, g in pairs if g is not None and r.requires_grad), strict=True)
        found = torch.autograd.grad(
            outputs, [values[i] for i in wanted], weights, create_graph=create_graph, allow_unused=True
        )
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(args)))
