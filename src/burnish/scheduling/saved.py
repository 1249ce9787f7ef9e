"""A schedule as JSON, to be applied to the same model later, or to another of its family.

Only the steps are saved, no weights. What an argument may be: numbers, texts, None, and lists, tuples and dicts of
such; classes and functions, as `package.module:name`, where they can be imported by it; and what `find` found, as what
was looked for. Paths with `*` fit models with another number of layers.

A file names code that `load` imports and the steps call, as a Python file does: load only those that you trust as much.
Nothing else in it is run; it is neither a pickle nor Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from burnish._files import write_text
from burnish.scheduling.find import FoundModule, FoundNode, Occurrence
from burnish.scheduling.fused_linears import FusedLinears, WithTail
from burnish.scheduling.primitives import PRIMITIVES, Primitive
from burnish.scheduling.step import Step, description_of, qualified_name

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Group, Schedule

FORMAT, VERSION = "burnish schedule", 1

_IMPORT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_RESULTS = (Occurrence, FoundNode, FoundModule)


class _NotData(Exception):
    """Why a value cannot be said as data."""


def save(history: Sequence[Step], path: str | PathLike[str]) -> None:
    """See `Schedule.save`."""
    data = {"format": FORMAT, "version": VERSION, "steps": [_step(n, step) for n, step in enumerate(history, 1)]}
    write_text(Path(path), json.dumps(data, indent=2) + "\n")


def load(
    path: str | PathLike[str], model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
) -> Schedule:
    """A Schedule of `model` on which the steps of a file were applied.

    The whole file is checked, and the classes and functions that it names are imported, before the first step.

    Args:
        path: what `Schedule.save` wrote. It names code that is imported and called: see the module's docstring.
        example_inputs: as in `create_schedule`.

    Raises ValueError, in one line, for what is no such file, and for a step that does not fit the model.
    """
    from burnish.scheduling.schedule import create_schedule

    where = Path(path)
    steps = _read(where)
    schedule = create_schedule(model, example_inputs)
    for number, step in enumerate(steps, 1):
        try:
            step.apply(schedule)
        except Exception as error:  # so may code that the file names
            raise ValueError(f"{where}: step {number}, {step.kind.verb}: {_told(error)}") from error
    return schedule


def _told(error: Exception) -> str:
    """What an error says, on one line; with its type, where it was not meant for whoever called."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = (text.splitlines() or [""])[0]
    return text if isinstance(error, (ValueError, TypeError, KeyError)) else f"{type(error).__name__}: {text}"


# --- Steps -> data ----------------------------------------------------------------------------------------------------


def _step(number: int, step: Step) -> dict[str, Any]:
    arguments = {}
    for name, value in step.arguments.items():
        try:
            arguments[name] = _encoded(value)
        except _NotData as error:
            raise ValueError(f"save: step {number}, {step.primitive}: {name} cannot be saved: {error}") from None
    return {"primitive": step.primitive, "path": step.path, "arguments": arguments}


def _encoded(value: Any) -> Any:
    if isinstance(value, _RESULTS):
        return {"find": _encoded(value.origin.query), "in": value.origin.base, "index": value.origin.index}
    if isinstance(value, list) and value and all(isinstance(item, _RESULTS) for item in value):
        return _encoded_results(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotData(f"JSON has no {value}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encoded(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise _NotData("a dict with keys that are no texts")
        return {"dict": {key: _encoded(item) for key, item in value.items()}}
    if isinstance(value, WithTail):
        return {"with_tail": _encoded(value.tail)}
    return {"import": _import_path(value)}


def _encoded_results(results: list[Any]) -> Any:
    first = results[0].origin
    origins = [result.origin for result in results]
    complete = [origin.index for origin in origins] == list(range(first.count))
    if complete and all(o.query is first.query and o.base == first.base for o in origins):
        return {"find": _encoded(first.query), "in": first.base}
    return [_encoded(result) for result in results]


def _import_path(value: Any) -> str:
    if isinstance(value, nn.Module):
        raise _NotData(f"it is a {type(value).__name__}; give a class with from_modules, or a function")
    name = qualified_name(value)
    if name is None:
        raise _NotData(f"it is {description_of(value)}, which cannot be imported by a name")
    module = getattr(value, "__module__", "")
    if module in ("__main__", "builtins"):
        raise _NotData(f"{name} is in {module}; put it into a file of its own and import it")
    return f"{name.removesuffix(f'.{value.__qualname__}')}:{value.__qualname__}"


# --- data -> Steps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Find:
    """What is to be looked for when the step's turn comes: all of it, or one of what is found."""

    query: Any
    base: str
    index: int | None

    def found(self, schedule: Schedule) -> Any:
        found = (schedule[self.base] if self.base else schedule).find(self.query)
        if self.index is None:
            return found
        if self.index >= len(found):
            raise ValueError(f"number {self.index + 1} of what was found is wanted, and {len(found)} were found")
        return found[self.index]


@dataclass(frozen=True)
class _SavedStep:
    kind: type[Primitive]
    path: str
    arguments: dict[str, Any]

    def apply(self, schedule: Schedule) -> None:
        part: Schedule | Group = schedule
        if self.path:
            part = schedule.find_all(self.path) if "*" in self.path else schedule[self.path]
        part.apply(self.kind(**{name: _found(value, schedule) for name, value in self.arguments.items()}))


def _found(value: Any, schedule: Schedule) -> Any:
    if isinstance(value, list):
        return [_found(item, schedule) for item in value]
    return value.found(schedule) if isinstance(value, _Find) else value


def _read(path: Path) -> list[_SavedStep]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is no schedule that Schedule.save wrote")
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')!r}; this Burnish reads version {VERSION}")
    steps = data.get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"{path}: steps must be a list")
    read = []
    for number, step in enumerate(steps, 1):
        try:
            read.append(_read_step(step))
        except ValueError as error:
            raise ValueError(f"{path}: step {number}: {error}") from error
    return read


def _read_step(step: Any) -> _SavedStep:
    if not isinstance(step, dict) or step.keys() != {"primitive", "path", "arguments"}:
        raise ValueError("it must have a primitive, a path and arguments, and nothing else")
    name, path, arguments = step["primitive"], step["path"], step["arguments"]
    if not isinstance(name, str) or name not in PRIMITIVES:
        near = difflib.get_close_matches(str(name), PRIMITIVES, n=1) or sorted(PRIMITIVES)
        raise ValueError(f"there is no primitive {name!r}; there is {', '.join(near)}")
    if not isinstance(path, str):
        raise ValueError(f"path must be a text, got {path!r}")
    if not isinstance(arguments, dict):
        raise ValueError("arguments must be a JSON object")
    kind = PRIMITIVES[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for argument in arguments:
        if argument not in fields:
            raise ValueError(f"{name} has no argument {argument!r}; it has {', '.join(fields) or 'none'}")
    for argument, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and argument not in arguments:
            raise ValueError(f"{name} needs the argument {argument!r}")
    return _SavedStep(kind, path, {key: _decoded(value, key) for key, value in arguments.items()})


def _decoded(data: Any, argument: str) -> Any:
    if isinstance(data, list):
        return [_decoded(item, argument) for item in data]
    if not isinstance(data, dict):
        return data
    read = _TAGS.get(frozenset(data))
    if read is None:
        raise ValueError(f"{argument} has a value that cannot be read: an object of {', '.join(data) or 'nothing'}")
    return read(data, argument)


def _decoded_tuple(data: dict[str, Any], argument: str) -> Any:
    if not isinstance(data["tuple"], list):
        raise ValueError(f"{argument}: a tuple must be a list in JSON")
    return tuple(_decoded(data["tuple"], argument))


def _decoded_dict(data: dict[str, Any], argument: str) -> Any:
    if not isinstance(data["dict"], dict):
        raise ValueError(f"{argument}: a dict must be an object in JSON")
    return {key: _decoded(value, argument) for key, value in data["dict"].items()}


def _decoded_tail(data: dict[str, Any], argument: str) -> Any:
    tail = _decoded(data["with_tail"], argument)
    if not callable(tail):
        raise ValueError(f"{argument}: with_tail must be a function")
    return FusedLinears.with_tail(tail)


def _decoded_find(data: dict[str, Any], argument: str) -> _Find:
    query, base, index = _decoded(data["find"], argument), data["in"], data.get("index")
    if not isinstance(base, str) or not (isinstance(query, str) or callable(query)):
        raise ValueError(f"{argument}: to find are a regular expression or a function, in a path")
    if "index" in data and (type(index) is not int or index < 0):
        raise ValueError(f"{argument}: index must be a number from 0, got {index!r}")
    return _Find(query, base, index)


def _imported(data: dict[str, Any], argument: str) -> Any:
    name = data["import"]
    if not isinstance(name, str) or not _IMPORT.fullmatch(name):
        raise ValueError(f"{argument}: to import, a text like package.module:name is needed, got {name!r}")
    module, _, attributes = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # somebody's code
        told = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{argument}: importing {module} raised {type(error).__name__}: {told}") from error
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)  # type: ignore[assignment]
        if found is None:
            raise ValueError(f"{argument}: {module} has no {attributes}")
    if not callable(found):
        raise ValueError(f"{argument}: {name} is no class and no function")
    return found


_TAGS: dict[frozenset[str], Callable[[dict[str, Any], str], Any]] = {
    frozenset({"tuple"}): _decoded_tuple,
    frozenset({"dict"}): _decoded_dict,
    frozenset({"with_tail"}): _decoded_tail,
    frozenset({"find", "in"}): _decoded_find,
    frozenset({"find", "in", "index"}): _decoded_find,
    frozenset({"import"}): _imported,
}

__all__ = ["FORMAT", "VERSION", "load", "save"]
