"""`checkpoint`: activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from burnish.scheduling.primitives.primitive import Primitive, register

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Checkpoint(Primitive):
    """Recomputes the module's activations in the backward pass instead of keeping them, with the same random numbers.

    In eval mode and without gradients nothing changes. The module, its weights and their names stay what they are.
    A call with a KV cache is refused, which the module would write to twice: give Hugging Face's models
    `use_cache=False`.
    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; `torch.utils.checkpoint`.
    """

    verb: ClassVar[str] = "checkpoint"

    def check(self, schedule: Schedule) -> None:
        module = schedule.mod
        if is_checkpointed(module):
            raise ValueError(f"checkpoint: {schedule.label} is checkpointed already")
        if "forward" in vars(module):
            raise ValueError(f"checkpoint: the forward of {schedule.label} was replaced by another function")
        if type(module).forward is nn.Module.forward:
            raise ValueError(f"checkpoint: {schedule.label} has no forward; checkpoint what is in it")

    def apply(self, schedule: Schedule, plan: None) -> int:
        module = schedule.mod
        # On the instance: the class, and with it `isinstance` and what traces the class's forward, stays.
        module.__dict__["forward"] = MethodType(_recomputed, module)
        return 1


def is_checkpointed(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) is _recomputed


def _recomputed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_cache)
    traced = any(isinstance(value, fx.Proxy) for value in leaves)
    if traced or not module.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if any(map(_is_cache, leaves)):
        name = type(module).__name__
        raise ValueError(f"{name} is checkpointed, and would write to its KV cache twice: call with use_cache=False")
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether it is a KV cache, Hugging Face's or ours."""
    return hasattr(value, "get_seq_length")
