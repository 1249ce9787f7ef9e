"""`tensor_parallel`: a model divided by its own plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from burnish.scheduling.primitives.primitive import Primitive, register

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class TensorParallel(Primitive):
    """Divides every layer that the model's plan names among the ranks of torch.distributed, collectives included.

    The plan is Hugging Face's, the one given, or what the layers' names say; see `burnish.parallel.tensor_parallel`.
    """

    verb: ClassVar[str] = "tensor_parallel"
    mesh: Any = None
    plan: Mapping[str, str] | None = None
    sequence_parallel: bool = False

    def check(self, schedule: Schedule) -> nn.Module:
        from burnish.parallel.group import group_of

        group_of(self.mesh)
        outside = _users(schedule.tree, schedule.mod)
        for name, parameter in schedule.mod.named_parameters():
            if id(parameter) in outside:
                raise ValueError(f"tensor_parallel: {name} of {schedule.label} is tied to a weight outside of it")
        return schedule.mod

    def apply(self, schedule: Schedule, plan: nn.Module) -> int:
        from burnish.parallel import tensor_parallel
        from burnish.parallel.shard import shard_of

        # It looks at everything before it changes anything; what it changes then, a Snapshot has.
        tensor_parallel(plan, self.mesh, self.plan, sequence_parallel=self.sequence_parallel)
        divided = [m for m in plan.modules() if any(shard_of(p) for p in m.parameters(recurse=False))]
        return len(divided)


def _users(tree: nn.Module, part: nn.Module) -> set[int]:
    """The weights that modules outside of `part` have."""
    inside = {id(module) for module in part.modules()}
    outside = [module for module in tree.modules() if id(module) not in inside]
    return {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
