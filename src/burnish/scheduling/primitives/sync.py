"""`sync`: a collective before or behind a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from burnish.scheduling.primitives.primitive import Primitive, register

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Sync(Primitive):
    """Sums, gathers or scatters a module's result, input or input's gradient among the ranks of torch.distributed.

    Behind weights that are divided along their inputs: "fwd_post", "all_reduce". Before those that are divided along
    their outputs, for training: "bwd_post", "all_reduce". See `burnish.parallel.sync` for all.
    """

    verb: ClassVar[str] = "sync"
    when: str
    op: str
    mesh: Any = None
    axis: int | None = None

    def check(self, schedule: Schedule) -> None:
        from burnish.parallel import SYNCS
        from burnish.parallel.group import group_of
        from burnish.parallel.hooks import syncs_of

        module, label = schedule.mod, schedule.label
        if (self.when, self.op) not in SYNCS:
            known = ", ".join(map(" ".join, SYNCS))
            raise ValueError(f"sync: there is no {self.op!r} at {self.when!r}; there are: {known}")
        if self.axis is not None and SYNCS[self.when, self.op] is None:
            raise ValueError(f"sync: axis={self.axis}: {self.op} at {self.when} has none")
        if type(module).forward is nn.Module.forward:
            raise ValueError(f"sync: {label} has no forward; synchronize what is in it")
        if any((known.when, known.op) == (self.when, self.op) for known in syncs_of(module)):
            raise ValueError(f"sync: {self.op} at {self.when} of {label} is there already")
        group_of(self.mesh)

    def apply(self, schedule: Schedule, plan: None) -> int:
        from burnish.parallel import sync

        sync(schedule.mod, self.when, self.op, self.mesh, axis=self.axis)
        return 1
