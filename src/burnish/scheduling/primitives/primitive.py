"""What a primitive is, and the registry of all."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule

PRIMITIVES: dict[str, type[Primitive]] = {}
_Kind = TypeVar("_Kind", bound="type[Primitive]")


class Primitive(ABC):
    """One way to change a part of a model: a frozen dataclass of its arguments.

    `check` raises before anything changes, `apply` changes the module tree. It puts new modules into the tree or sets
    attributes of modules; it never changes a graph or the values of a tensor in place, so that a Snapshot of the tree
    is the way back.
    """

    verb: ClassVar[str]

    @abstractmethod
    def check(self, schedule: Schedule) -> Any:
        """What `apply` needs to know. ValueError or TypeError, in one line, where the primitive cannot be applied."""

    @abstractmethod
    def apply(self, schedule: Schedule, plan: Any) -> int:
        """Changes the tree as `check` planned. Returns how many matches, or modules, were changed."""

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def register(kind: _Kind) -> _Kind:
    """Lists a primitive under its name."""
    if kind.verb in PRIMITIVES:
        raise ValueError(f"primitive {kind.verb!r} is registered already")
    PRIMITIVES[kind.verb] = kind
    return kind
