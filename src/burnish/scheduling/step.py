"""The history of a Schedule: one Step for each primitive that was applied, and the Python that replays it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from burnish.record import StepRecord
from burnish.scheduling.find import Origin
from burnish.scheduling.snapshot import Snapshot

_IN_ORDER = ("new", "match", "kind", "make", "key", "value")  # arguments that are written without their names
_WRITTEN = (bool, int, float, str, type(None))


@dataclass
class Step:
    """One primitive, applied.

    Attributes:
        primitive: its name.
        path: of the module that it was applied to; with `*` where it was applied to a group.
        arguments: by name, those that are not their defaults.
        matches: how many matches, or modules, were changed.
        seconds: how long it took.
        added, removed: paths of modules that are, or are no longer, in the model since.
        numerics: lines on what was verified; empty where nothing was.
        verified: whether the model was found right after it.
    """

    primitive: str
    path: str
    arguments: dict[str, Any]
    matches: int = 0
    seconds: float = 0.0
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    numerics: list[str] = field(default_factory=list)
    verified: bool = field(default=False, repr=False, compare=False)
    before: Snapshot | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.primitive

    def code(self) -> str:
        """The Python that repeats the step on a Schedule called `sch`; `...` where an argument cannot be written."""
        notes: list[str] = []
        arguments = [
            _written(value, notes) if name in _IN_ORDER else f"{name}={_written(value, notes)}"
            for name, value in self.arguments.items()
        ]
        called = f"{_schedule(self.path)}.{self.primitive}({', '.join(arguments)})"
        return "  # ".join([called, *(["; ".join(notes)] if notes else [])])

    def __str__(self) -> str:
        count = f"{self.matches} match{'' if self.matches == 1 else 'es'}"
        where = self.path or "the model"
        return "\n".join([f"{self.primitive} in {where}: {count}, {self.seconds * 1e3:.0f} ms", *self.numerics])


class History(list[Any]):
    """The Steps, in order; in the place of `optimize` the StepRecords of the default steps that ran. Print it."""

    def __str__(self) -> str:
        if not self:
            return "no steps yet"
        places = [getattr(step, "path", "") or "the model" for step in self]
        width, where = max(len(step.name) for step in self), max(map(len, places))
        lines = []
        for number, (step, place) in enumerate(zip(self, places, strict=True), 1):
            matches = sum(step.matches.values()) if isinstance(step, StepRecord) else step.matches
            count = f"{matches} match{' ' if matches == 1 else 'es'}"
            line = f"{number:>2}  {step.name:<{width}}  {place:<{where}}  {count:>10}  {step.seconds * 1e3:>6.0f} ms"
            lines += [line, *(f"    {text}" for text in step.numerics)]
        return "\n".join(lines)

    def code(self) -> str:
        """A Python program that applies the same steps to a module called `model`."""
        lines = [step.code() for step in self]
        modules = sorted({name for step in self for name in _modules_in(step.arguments.values())} | {"burnish"})
        imports = [f"import {name}" for name in modules]
        return "\n".join([*imports, "", "sch = burnish.create_schedule(model)", *lines])


def arguments_of(primitive: Any) -> dict[str, Any]:
    """The fields of a primitive that are not their defaults."""
    given = {f.name: (getattr(primitive, f.name), _default(f)) for f in dataclasses.fields(primitive)}
    return {name: value for name, (value, default) in given.items() if value is not default and value != default}


def _default(argument: dataclasses.Field[Any]) -> Any:
    made = argument.default_factory
    return argument.default if made is dataclasses.MISSING else made()


def _schedule(path: str) -> str:
    if not path:
        return "sch"
    return f"sch.find_all({path!r})" if "*" in path else f"sch[{path!r}]"


# --- arguments as Python ----------------------------------------------------------------------------------------------


def _written(value: Any, notes: list[str]) -> str:
    origins = _origins(value)
    if origins:
        return _found(origins, notes)
    if isinstance(value, _WRITTEN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_written(item, notes) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(k, notes)}: {_written(v, notes)}" for k, v in value.items()) + "}"
    if (name := qualified_name(value)) is not None:
        return name
    if dataclasses.is_dataclass(value) and hasattr(value, "written"):
        return str(value.written(lambda part: _written(part, notes)))
    notes.append(description_of(value))
    return "..."


def _origins(value: Any) -> list[Origin]:
    """Where results of `find` come from; empty for other values."""
    if (origin := getattr(value, "origin", None)) is not None and isinstance(origin, Origin):
        return [origin]
    if isinstance(value, list) and value:
        origins = [getattr(item, "origin", None) for item in value]
        if all(isinstance(origin, Origin) for origin in origins):
            return origins  # type: ignore[return-value]
    return []


def _found(origins: Sequence[Origin], notes: list[str]) -> str:
    queries = {id(origin.query): origin for origin in origins}
    texts = {key: f"{_schedule(o.base)}.find({_written(o.query, notes)})" for key, o in queries.items()}
    first = origins[0]
    if len(queries) == 1 and [origin.index for origin in origins] == list(range(first.count)) and len(origins) > 1:
        return texts[id(first.query)]
    parts = [f"{texts[id(origin.query)]}[{origin.index}]" for origin in origins]
    return parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"


def qualified_name(value: Any) -> str | None:
    """How a class or function is reached, from the outermost package that has it; None where it cannot be."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or isinstance(value, nn.Module):
        return None
    if module in ("__main__", "builtins"):
        return name if _reached(module, name) is value else None
    packages = module.split(".")
    places = (".".join(packages[: i + 1]) for i in range(len(packages)))
    return next((f"{place}.{name}" for place in places if _reached(place, name) is value), None)


def _reached(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _modules_in(values: Any) -> set[str]:
    """The modules that must be imported for these arguments."""
    names: set[str] = set()
    for value in values:
        if isinstance(value, (list, tuple)) and not _origins(value):
            names |= _modules_in(value)
        elif origins := _origins(value):
            names |= _modules_in(origin.query for origin in origins)
        elif (name := qualified_name(value)) is not None and "." in name:
            names.add(name.removesuffix(f".{value.__qualname__}"))
        elif dataclasses.is_dataclass(value) and hasattr(value, "written"):
            names |= {"burnish.scheduling"} | _modules_in(getattr(value, f.name) for f in dataclasses.fields(value))
    return names


def description_of(value: Any) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{getattr(value, '__name__', 'a function')} at {code.co_filename}:{code.co_firstlineno}"
    return f"a {type(value).__name__}"
