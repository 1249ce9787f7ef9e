"""What a model returns, made of its flat outputs in each call."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

_Make = Callable[[Sequence[Any]], Any]


def unflattener(spec: pytree.TreeSpec) -> _Make:
    """`spec.unflatten`. For leaves in one container, as most models return, what makes that is looked up here, and not
    in each call (1 to 2 us)."""
    if spec.is_leaf() or not all(child.is_leaf() for child in spec.children()):
        return spec.unflatten
    unflatten, context = pytree.SUPPORTED_NODES[spec.type].unflatten_fn, spec.context

    def make(leaves: Sequence[Any]) -> Any:
        return unflatten(list(leaves), context)

    kind: Any = spec.type  # of named tuples a function
    if isinstance(kind, type) and issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind):
        return _Records(kind, make)
    return make


class _Records:
    """Makes what Hugging Face's models return: a dataclass that is also a dictionary of the fields that are not None.
    Its constructor takes 16 us, and to fill one in 1.5: done where that once gave just what the constructor gave."""

    def __init__(self, record: Any, make: _Make) -> None:
        self._record, self._make = record, make
        self._fields = dict.fromkeys(field.name for field in dataclasses.fields(record))
        self._keys: tuple[str, ...] | None = None  # what to fill in; none: the constructor is to be called
        self._looked = False

    def __call__(self, leaves: Sequence[Any]) -> Any:
        if self._keys is not None:
            return self._filled(self._keys, leaves)
        record = self._make(leaves)
        if not self._looked:
            keys = tuple(record)
            if len(keys) == len(leaves) and _same(self._filled(keys, leaves), record):
                self._keys = keys
            self._looked = True
        return record

    def _filled(self, keys: tuple[str, ...], leaves: Sequence[Any]) -> Any:
        record = self._record.__new__(self._record)
        attributes = vars(record)
        attributes.update(self._fields)
        for key, leaf in zip(keys, leaves, strict=True):
            OrderedDict.__setitem__(record, key, leaf)  # past the class's own, which sets the attribute too
            attributes[key] = leaf
        return record


def _same(one: Any, other: Any) -> bool:
    """Whether two records have the same objects under the same names, in one order."""
    pairs = [(OrderedDict.items(record), vars(record).items()) for record in (one, other)]
    return all(
        len(a) == len(b) and all(x == y and v is w for (x, v), (y, w) in zip(a, b, strict=True))
        for a, b in zip(*pairs, strict=True)
    )
