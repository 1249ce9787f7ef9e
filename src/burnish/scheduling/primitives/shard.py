"""`shard`: a parameter of which each rank holds a slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.tree import join

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Shard(Primitive):
    """Cuts a parameter along one axis, so that each rank of torch.distributed holds its slice; `sync` puts sums behind.

    Output features are axis 0 of a Linear's weight (and its bias), input features are axis 1. Tied weights stay tied.
    """

    verb: ClassVar[str] = "shard"
    name: str
    axis: int
    mesh: Any = None

    def check(self, schedule: Schedule) -> str:
        """The parameter's path from the whole model."""
        from burnish.parallel.group import group_of
        from burnish.parallel.shard import Shard as Cut
        from burnish.parallel.shard import shard_of

        module, label = schedule.mod, schedule.label
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if self.name not in parameters:
            its = ", ".join(name for name in parameters if "." not in name) or "none of its own"
            raise ValueError(f"shard: {label} has no parameter {self.name!r}; it has {its}")
        parameter = parameters[self.name]
        owner = module.get_submodule(self.name.rpartition(".")[0])
        if _is_merged(owner):
            raise ValueError(f"shard: the weights of {label} are merged; shard them before they are")
        if shard_of(parameter) is not None:
            raise ValueError(f"shard: {self.name} of {label} is divided already")
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise TypeError(f"shard: axis must be an integer, got {self.axis!r}")
        if not -parameter.dim() <= self.axis < parameter.dim():
            raise ValueError(f"shard: axis={self.axis} is none of the {parameter.dim()} of {self.name} of {label}")
        axis = self.axis % parameter.dim()
        whole = join(schedule.path, self.name)
        Cut(axis, group_of(self.mesh).group_name).slices(f"shard: {whole}", parameter.shape[axis])
        return whole

    def apply(self, schedule: Schedule, plan: str) -> int:
        from burnish.parallel import shard_parameter

        shard_parameter(schedule.tree.model, plan, self.axis, self.mesh)
        return 1


def _is_merged(module: nn.Module) -> bool:
    return bool(getattr(module, "merged", None))
