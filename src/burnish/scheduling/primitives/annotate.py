"""`annotate`: a note on a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from burnish.scheduling.primitives.primitive import Primitive, register

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule

ATTRIBUTE = "annotations"


@register
@dataclass(frozen=True)
class Annotate(Primitive):
    """Writes a note on the module, for whoever reads `sch["..."].annotations` later. It changes nothing else."""

    verb: ClassVar[str] = "annotate"
    key: str
    value: Any

    def check(self, schedule: Schedule) -> None:
        if not isinstance(self.key, str) or not self.key:
            raise ValueError(f"annotate: the name must be a text that is not empty, got {self.key!r}")
        if not isinstance(getattr(schedule.mod, ATTRIBUTE, {}), dict):
            raise ValueError(f"annotate: {schedule.label} has an attribute {ATTRIBUTE!r} of its own")

    def apply(self, schedule: Schedule, plan: None) -> int:
        module = schedule.mod
        module.__dict__[ATTRIBUTE] = {**getattr(module, ATTRIBUTE, {}), self.key: self.value}
        return 1
