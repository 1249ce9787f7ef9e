"""Parameters of which each rank holds a slice: plain tensors, cut along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.parallel.collectives import all_gather, all_reduce
from burnish.parallel.group import Mesh, group_of, rank_and_size
from burnish.parallel.layers import is_linear, note_features


@dataclass(frozen=True)
class Shard:
    """How a tensor is cut.

    Attributes:
        axis: along which it is divided, from 0.
        group_name: of the ranks that it is divided among.
        parts: sizes along `axis` of what the tensor is merged of, such as queries, keys and values: each of them is
            divided by itself. Empty: it is one.
    """

    axis: int
    group_name: str
    parts: tuple[int, ...] = ()

    def slices(self, name: str, size: int) -> list[slice]:
        """What this rank holds of `size` entries along the axis, in order. ValueError, with the tensor's `name`, where
        they do not divide."""
        rank, ranks = rank_and_size(self.group_name)
        parts = self.parts or (size,)
        if sum(parts) != size:
            raise ValueError(f"{name}: the parts {parts} do not make up its size of {size} along axis {self.axis}")
        found, start = [], 0
        for part in parts:
            if part % ranks:
                whole = f"its size of {size}" if part == size else f"a part of {part} of its {size} entries"
                raise ValueError(f"{name}: {whole} along axis {self.axis} does not divide among {ranks} ranks")
            share = part // ranks
            found.append(slice(start + rank * share, start + (rank + 1) * share))
            start += part
        return found

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice, in memory of its own."""
        pieces = [
            whole.narrow(self.axis, piece.start, piece.stop - piece.start)
            for piece in self.slices(name, whole.shape[self.axis])
        ]
        return torch.cat(pieces, dim=self.axis)

    def joined(self, mine: Tensor) -> Tensor:
        """The whole tensor, from every rank's slice: all of them have to call this."""
        _, ranks = rank_and_size(self.group_name)
        whole = all_gather(mine, self.axis, self.group_name)
        if not self.parts:
            return whole
        shares = [part // ranks for part in self.parts]
        by_rank = [piece.split(shares, dim=self.axis) for piece in whole.chunk(ranks, dim=self.axis)]
        return torch.cat([torch.cat(same, dim=self.axis) for same in zip(*by_rank, strict=True)], dim=self.axis)


def shard_of(parameter: Tensor) -> Shard | None:
    """How the parameter was cut; None for a whole one."""
    return getattr(parameter, "_burnish_shard", None)


def shard_parameter(
    module: nn.Module, name: str, axis: int, mesh: Mesh = None, *, parts: tuple[int, ...] = ()
) -> nn.Parameter:
    """Puts this rank's slice in the place of a parameter, in `module` itself.

    Where the same parameter is used under several names in `module`, all of them have the slice: tied weights stay
    tied. The whole tensor is left as it was; models that share it keep it.

    Args:
        name: the parameter's path from `module`, such as "weight" or "lm_head.weight".
        axis: along which it is divided; may be negative.
        mesh: among whom: a mesh of one dimension, a process group, or None for all processes.
        parts: see `Shard`.

    Raises:
        ValueError: there is no such parameter or axis, it is divided already, or its size does not divide.
    """
    parameter = _find(module, name)
    if shard_of(parameter) is not None:
        raise ValueError(f"{name}: it is divided already")
    if not -parameter.dim() <= axis < parameter.dim():
        raise ValueError(f"{name}: axis={axis} is none of its {parameter.dim()}")
    shard = Shard(axis % parameter.dim(), group_of(mesh).group_name, parts)
    with torch.no_grad():
        mine = _noted(shard.cut(name, parameter.detach()), parameter, shard, None)
    _replace(module, parameter, mine)
    return mine


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be of the whole model, on every rank. All ranks have to call this."""
    shards = {name: shard_of(p) for name, p in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        return {
            name: tensor if (shard := shards.get(name)) is None else shard.joined(tensor)
            for name, tensor in model.state_dict().items()
        }


def sum_gradients(module: nn.Module, name: str, mesh: Mesh = None) -> None:
    """Has the gradients summed of a parameter that all ranks hold alike, but use for parts of their own: in its place
    comes one with the same memory, as in `shard_parameter`. ValueError where there is no such parameter."""
    parameter = _find(module, name)
    _replace(module, parameter, _noted(parameter.detach(), parameter, None, group_of(mesh).group_name))


def is_summed(parameter: Tensor) -> bool:
    """Whether its gradients are summed over the ranks."""
    return getattr(parameter, "_burnish_summed", None) is not None


def with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter with other values that is cut, and whose gradients are summed, as `parameter` is."""
    return _noted(values, parameter, shard_of(parameter), getattr(parameter, "_burnish_summed", None))


def _noted(values: Tensor, like: nn.Parameter, shard: Shard | None, summed: str | None) -> nn.Parameter:
    made: Any = nn.Parameter(values, requires_grad=like.requires_grad)
    made._burnish_shard, made._burnish_summed = shard, summed
    if summed is not None and made.requires_grad:
        made.register_hook(lambda grad: all_reduce(grad, summed))
    return made


def _find(module: nn.Module, name: str) -> nn.Parameter:
    parameter = dict(module.named_parameters(remove_duplicate=False)).get(name)
    if parameter is None:
        raise ValueError(f"{name}: {type(module).__name__} has no parameter of that name")
    return parameter


def _replace(module: nn.Module, parameter: nn.Parameter, made: nn.Parameter) -> None:
    """Wherever the parameter is used in `module`."""
    for owner in module.modules():
        for name, other in owner._parameters.items():
            if other is parameter:
                owner._parameters[name] = made
                if name == "weight" and is_linear(owner):
                    note_features(owner)
