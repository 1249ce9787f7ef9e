"""Where weights live, and whether they and a model's modules are still where they were: asked in each call."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightPlace:
    """Where a weight lives: the dictionary of the module that owns it, and its name there. Read anew at each call, so
    that a replaced parameter is seen.

    Attributes:
        is_attribute: it is neither a parameter nor a buffer, so that `owner` is all that the module has.
    """

    owner: Mapping[str, Any]
    name: str
    path: str
    is_attribute: bool = False


def find_weight(roots: Sequence[nn.Module], path: str) -> WeightPlace:
    """The user's model is asked first; constants that capture lifted and packed weights live on the graph module."""
    module_path, _, name = path.rpartition(".")
    for root in roots:
        try:
            module = root.get_submodule(module_path)
        except AttributeError:
            continue
        for owner in (module._parameters, module._buffers, vars(module)):
            if name in owner:
                return WeightPlace(owner, name, path, is_attribute=owner is vars(module))
    raise KeyError(path)


class Places:
    """Where weights and a model's modules are, to be told when one of them has been moved, replaced or removed.

    Values that change in place are nothing to tell, for whoever reads the weight sees them; but of `copied` weights,
    each with its version when it was copied, only copies are read. (Or it was looked at, and is not read at all.)
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[WeightPlace], copied: Sequence[tuple[WeightPlace, int]] = ()
    ) -> None:
        weights = [*weights, *(place for place, _ in copied)]
        self._held: list[Tensor] = [place.owner[place.name] for place in weights]
        self._copied = self._held[len(weights) - len(copied) :]
        self._versions = [version for _, version in copied]
        self._pointers = list(map(Tensor.data_ptr, self._held))
        # What else a module has changes as it likes: in such a dictionary only the weight counts.
        self._attributes = [(p.owner, p.name, w) for p, w in zip(weights, self._held, strict=True) if p.is_attribute]
        owners = {id(place.owner): place.owner for place in weights if not place.is_attribute}
        # A module that was put in another's place has weights of its own; those of the old one are where they were.
        children = [module._modules for module in model.modules() if module._modules]
        self._entries = _Entries([*owners.values(), *children])

    def read(self) -> list[Tensor] | None:
        """The weights as they are now; None when something is no longer where it was, or no longer what was copied."""
        if [weight._version for weight in self._copied] != self._versions:
            return None
        if not self._entries.are_the_same():
            return None
        if not all(owner.get(name) is weight for owner, name, weight in self._attributes):
            return None
        # 20 us for BERT-base's 261 weights; torch._C._tensors_data_ptrs_at_indices_equal, all in C++, takes as long.
        return self._held if list(map(Tensor.data_ptr, self._held)) == self._pointers else None


_Check = Callable[[Sequence[Mapping[str, Any]]], bool]

_PATIENCE = 64
"""How many calls compare all entries before guards are made. They cost about as much: where something is replaced and
put back again and again, the host's time at most doubles."""


class _Entries:
    """The entries of dictionaries, to be told when one of them has been replaced, added or removed.

    To compare them all takes 30 us for BERT-base's 178 dictionaries. Where torch can tell in 3 us that nobody has
    written to one of them, they are compared only when somebody has, and may have put back what was there.
    """

    def __init__(self, dictionaries: Sequence[Mapping[str, Any]]) -> None:
        self._dictionaries = list(dictionaries)
        # Compared as lists, which runs in C: one by one it takes three times as long.
        self._values = [dictionary.values() for dictionary in dictionaries]
        self._before = list(chain.from_iterable(self._values))
        self._unwritten: _Check | None = None
        self._compared = 0

    def are_the_same(self) -> bool:
        unwritten = self._unwritten
        if unwritten is not None:
            if unwritten(self._dictionaries):
                return True
            self._unwritten, self._compared = None, 0
        compared = self._compared = self._compared + 1
        # Before the comparison: what is written meanwhile is seen by the one or by the other.
        unwritten = _version_guards(self._dictionaries) if compared == _PATIENCE else None
        now = list(chain.from_iterable(self._values))
        if len(now) != len(self._before) or not all(map(operator.is_, now, self._before)):
            return False
        if unwritten is not None:
            self._unwritten = unwritten
        return True


def _version_guards(dictionaries: Sequence[Mapping[str, Any]]) -> _Check | None:
    """A check that nobody has written to these dictionaries since, by the guards of torch.compile: C++ that compares
    the version which Python keeps of each. None where this torch has no such guards, or has not loaded them (to import
    them takes seconds; whoever captures a model has)."""
    try:
        kind = sys.modules["torch._dynamo.guards"].GuardManagerType.GUARD_MANAGER
        guards: Any = torch._C._dynamo.guards.RootGuardManager()
        for i, dictionary in enumerate(dictionaries):
            if type(dictionary) is not dict:  # one whose methods are its own
                return None
            guard = guards.list_getitem_manager(i, f"[{i}]", dictionary, kind)
            guard.add_dict_version_guard(dictionary, ["unwritten"], None)
        check: _Check = guards.check
        return check if check(dictionaries) else None
    except Exception:  # all of it is torch's own business, and may change with any release
        return None
