"""`replace_all`: every module of one type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.primitives.replace import whole

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@dataclass(frozen=True)
class _Make:
    """A function of the old module, as what `whole` takes."""

    make: Callable[[nn.Module], Any]

    @property
    def __name__(self) -> str:
        return getattr(self.make, "__name__", "make")

    def from_modules(self, old: nn.Module) -> Any:
        return self.make(old)


@register
@dataclass(frozen=True)
class ReplaceAll(Primitive):
    """Replaces every module of exactly one type by what a function makes of it.

    `make(old)` returns the new module, which can share the old one's weights; or `make` has a `from_modules`.
    """

    verb: ClassVar[str] = "replace_all"
    kind: type[nn.Module]
    make: Any

    def check(self, schedule: Schedule) -> list[tuple[nn.Module, nn.Module]]:
        if not (isinstance(self.kind, type) and issubclass(self.kind, nn.Module)):
            raise TypeError(f"replace_all: kind must be a class of modules such as nn.LayerNorm, got {self.kind!r}")
        if not callable(self.make) and not hasattr(self.make, "from_modules"):
            raise TypeError(f"replace_all: make must be a function of the old module, got {type(self.make).__name__}")
        found = [(path, module) for path, module in schedule.mod.named_modules() if type(module) is self.kind]
        if not found:
            raise ValueError(f"replace_all: {schedule.label} has no {self.kind.__name__}")
        new = self.make if hasattr(self.make, "from_modules") else _Make(self.make)
        return [(module, whole(new, module, path or schedule.label)) for path, module in found]

    def apply(self, schedule: Schedule, plan: list[tuple[nn.Module, nn.Module]]) -> int:
        for old, new in plan:
            schedule.tree.put(old, new)
        return len(plan)
