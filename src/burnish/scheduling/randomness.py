"""Random numbers of two runs of one model: whether they are the same, and how a run in float64 gets them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Draw = tuple[str, torch.Size]


class Draws(TorchDispatchMode):
    """Notes what draws random numbers: the operation, and the shape of what it gives. Runs that start from one seed and
    draw alike have the same random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_random(func, args, kwargs or {}):
            self.note(func, result)
        return result

    def note(self, func: Any, result: Any) -> None:
        first = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        self.draws.append((str(func), first.shape))


class Float64(Draws):
    """Runs a model whose floating tensors are in float64 with the random numbers of its own dtype.

    Casts that a model writes down ("compute this in float32") go to float64 too; a view may have to copy, because
    attention lays its result out otherwise in float64 than in half precision.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.view.default:
            func = aten.reshape.default
        if is_random(func, args, kwargs or {}):
            result = self._drawn(func, args, kwargs or {})
            self.note(func, result)
            return result
        args, kwargs = pytree.tree_map_only(torch.dtype, _widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        narrow = pytree.tree_map_only(Tensor, self._narrowed, args)
        # Of the model's own dtype, where the model asked for that of a tensor.
        kwargs = pytree.tree_map_only(torch.dtype, lambda d: self._dtype if d is torch.float64 else d, kwargs)
        drawn = func(*narrow, **kwargs)
        if func is aten.native_dropout.default:
            x, p, train = args
            mask = drawn[1]
            return (x * mask / (1 - p) if train and p < 1 else x * mask), mask
        if func._schema.is_mutable:  # bernoulli_, uniform_
            return args[0].copy_(narrow[0])
        return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, drawn)

    def _narrowed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers. Attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0))


def generator_states() -> list[Tensor]:
    """Of all devices' default generators: what tells whether two runs drew equally many numbers."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype
