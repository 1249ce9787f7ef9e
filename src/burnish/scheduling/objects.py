"""Objects among the arguments of a call that are neither tensors nor constants: caches of keys and values."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from burnish.scheduling.sizes import HINT

_PLAIN = (str, bytes, int, float, bool, type(None))
_DEEPEST = 6


@dataclass(frozen=True)
class Opaque:
    """An object as it was when the call began, with a stand-in in the place of each tensor.

    It takes no memory, and what the call has done to the object since does not show.
    """

    kind: type
    copied: Any
    stand_ins: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any, stand_in: Callable[[Tensor], Any]) -> Opaque:
        tensors = list(_tensors_in(value, _DEEPEST))
        memo = {id(tensor): stand_in(tensor) for tensor in tensors}
        stand_ins = tuple(memo.values())
        return cls(type(value), copy.deepcopy(value, memo), stand_ins)

    def fake(self, make: Callable[[Any], Tensor]) -> Any:
        """The object once more, with a fake tensor for each stand-in."""
        return copy.deepcopy(self.copied, {id(stand_in): make(stand_in) for stand_in in self.stand_ins})


def is_opaque(value: Any) -> bool:
    """Whether it is an object that a call may change, or ask; some of these are registered with pytree."""
    if type(value) in (OrderedDict, defaultdict):
        return False
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor)) and not callable(value)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, (*_PLAIN, type, nn.Module)):
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for item in (*inside, *getattr(value, "__dict__", {}).values()):
            yield from _tensors_in(item, depth - 1)


class _Recording(type):
    """Classes whose calls are recorded, and which stand for the class that they were made of in `isinstance`."""

    original: type
    record: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.record(cls.original, args, kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)


@contextlib.contextmanager
def recorded_caches(model: nn.Module, record: Callable[..., Any]) -> Iterator[None]:
    """Within the `with`, the caches that Hugging Face's forwards make are made by a step of the graph.

    record: called with the class, its arguments and its keyword arguments.
    """
    library: Any = sys.modules.get("transformers.cache_utils")
    files = {type(module).__module__ for module in model.modules()} if library is not None else set()
    changed = [
        (namespace, name, value)
        for namespace in map(sys.modules.get, files)
        for name, value in (vars(namespace).items() if namespace is not None else ())
        if isinstance(value, type) and issubclass(value, library.Cache) and value.__module__ == library.__name__
    ]
    try:
        for namespace, name, value in changed:
            stand_in = _Recording(name, (), {"original": value, "record": staticmethod(record)})
            setattr(namespace, name, stand_in)
        yield
    finally:
        for namespace, name, value in changed:
            setattr(namespace, name, value)


def expect_answer(value: Any, answer: Any, question: str) -> None:
    """ValueError where an object answers otherwise than when the module was captured."""
    if isinstance(value, fx.Proxy):  # traced again: the question stays in the graph
        value.tracer.create_proxy("call_function", expect_answer, (value, answer, question), {})
    elif type(answer)(value) != answer:
        raise ValueError(f"the module was captured where {question} is {answer!r}, and it is {value!r}; {HINT}")
