"""`optimize`: the default steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.settings import Settings, check_settings

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Optimize(Settings, Primitive):
    """Has `build` give a model as `burnish.optimize` does: captured, fused, tuned and verified at its first call.

    Its arguments are those of `burnish.optimize`.
    """

    verb: ClassVar[str] = "optimize"

    def check(self, schedule: Schedule) -> None:
        if schedule.path:
            raise ValueError(f"optimize: {schedule.path} is a part; call it on the Schedule of the whole model")
        if schedule.settings is not None:
            raise ValueError("optimize: it is among the steps already")
        check_settings(self, schedule.mod)

    def apply(self, schedule: Schedule, plan: None) -> int:
        return 1
