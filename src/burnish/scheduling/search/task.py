"""`Task`: what a search tunes."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from burnish import __version__
from burnish.hardware import fingerprint
from burnish.scheduling.schedule import Schedule, create_schedule
from burnish.scheduling.search.space import Choice


@dataclass(frozen=True)
class Task:
    """A model, what a choice does to its schedule, and the call that counts: `search_schedules` says more of each."""

    make_model: nn.Module | Callable[[], nn.Module]
    apply: Callable[[Schedule, Choice], object]
    step: Callable[[nn.Module, Choice], object]
    work: Callable[[Choice], float]
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None

    def check(self) -> None:
        for name in ("make_model", "apply", "step", "work"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {type(getattr(self, name)).__name__}")

    def clean_model(self) -> nn.Module:
        """A model with weights of its own: the next trial's must not be what this one has trained."""
        if isinstance(self.make_model, nn.Module):
            return copy.deepcopy(self.make_model)
        made = self.make_model()
        if not isinstance(made, nn.Module):
            raise TypeError(f"make_model must return a torch.nn.Module, it returned a {type(made).__name__}")
        return made

    def schedule(self, model: nn.Module, choice: Choice) -> Schedule:
        schedule = create_schedule(model, self.example_inputs)
        self.apply(schedule, dict(choice))
        return schedule

    def digest(self, names: Iterator[str]) -> str:
        """Changes when the code of the user's functions changes, a model that was given, the names of what is chosen,
        the device or a version. What these functions use in turn is not looked at."""
        told = [__version__, sys.version, fingerprint("cpu"), fingerprint(), *names]
        told += [part for each in (self.apply, self.step, self.work) for part in _told(each)]
        if isinstance(self.make_model, nn.Module):
            told.append(repr(self.make_model))
            tensors = self.make_model.state_dict().items()
            told += [f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}" for name, tensor in tensors]
        else:
            told += _told(self.make_model)
        return hashlib.sha256("\n".join(told).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _told(function: Callable[..., Any]) -> Iterator[str]:
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        yield from _told_of_code(code)
    else:
        yield getattr(function, "__qualname__", type(function).__qualname__)


def _told_of_code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _told_of_code(constant)
        elif isinstance(constant, frozenset):  # whose order changes from process to process
            yield str(sorted(map(repr, constant)))
        else:
            yield repr(constant)
