"""`cut_pipeline_stage`: where one stage of a pipeline ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from burnish.scheduling.primitives.primitive import Primitive, register

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule

_ATTRIBUTE = "ends_pipeline_stage"


@register
@dataclass(frozen=True)
class CutPipelineStage(Primitive):
    """Ends a stage of a pipeline behind the module; `sch.build_pipeline()` splits the model there.

    It changes nothing else: `build` gives the whole model.
    """

    verb: ClassVar[str] = "cut_pipeline_stage"

    def check(self, schedule: Schedule) -> None:
        if not schedule.path:
            raise ValueError("cut_pipeline_stage: a stage ends behind a submodule, such as sch['layers.5']")
        if type(schedule.mod).forward is nn.Module.forward:
            raise ValueError(f"cut_pipeline_stage: {schedule.label} has no forward; a stage ends behind one of its own")
        if ends_stage(schedule.mod):
            raise ValueError(f"cut_pipeline_stage: a stage ends behind {schedule.label} already")

    def apply(self, schedule: Schedule, plan: None) -> int:
        schedule.mod.__dict__[_ATTRIBUTE] = True
        return 1


def ends_stage(module: nn.Module) -> bool:
    return bool(vars(module).get(_ATTRIBUTE, False))
