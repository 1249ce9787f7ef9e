"""The original names of weights that a Schedule has moved or merged.

A built module answers `state_dict()` with the original model's names, merged parameters cut into views, and takes such
a dict in `load_state_dict`. What became of a weight is seen in the tree: a moved one is still the same object, and a
module with merged ones says in `merged` what they are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Source:
    """Where a weight of the original model is now: a tensor by its name, and the rows of it."""

    name: str
    rows: slice | None = None

    def read(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]


@dataclass(frozen=True)
class Names:
    """How a built module's names become the original ones.

    Attributes:
        order: the original names.
        sources: those of weights that changed their name, with where they are now.
        own: other names that the built module has for a weight, by the name that `sources` has or that is the original.
    """

    order: tuple[str, ...]
    sources: dict[str, _Source]
    own: dict[str, tuple[str, ...]]

    def write(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """A hook: the entries of this module get the original names and order."""
        mine = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for name in self.order:
            source = self.sources.get(name)
            if source is not None and source.name in mine:
                state[prefix + name] = source.read(mine[source.name])
            elif name in mine:
                state[prefix + name] = mine.pop(name)
        moved = {name for names in self.own.values() for name in names}
        state.update({prefix + name: value for name, value in mine.items() if name not in moved})

    def read(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """A hook: entries with original names become the module's own."""
        tensors = named_tensors(module)
        parts: dict[str, list[tuple[str, _Source]]] = {}
        for name, source in self.sources.items():
            if prefix + source.name not in state:
                parts.setdefault(source.name, []).append((name, source))
        kept = {prefix + name for name in tensors}
        for own, pieces in parts.items():
            value = self._assembled(tensors[own], pieces, state, prefix, missing, errors)
            for name, _ in pieces:
                if prefix + name not in kept:
                    state.pop(prefix + name, None)
            state[prefix + own] = value
        for own, names in self.own.items():
            if prefix + own in state:
                state.update({prefix + name: state[prefix + own] for name in names})

    def _assembled(
        self,
        current: Tensor,
        pieces: list[tuple[str, _Source]],
        state: Mapping[str, Any],
        prefix: str,
        missing: list[str],
        errors: list[str],
    ) -> Tensor:
        missing += [prefix + name for name, _ in pieces if prefix + name not in state]
        given = {name: state[prefix + name] for name, _ in pieces if prefix + name in state}
        if any(source.rows is None for _, source in pieces):  # moved, not merged
            return next(iter(given.values()), current.detach())
        result = current.detach().clone()
        for name, source in pieces:
            rows = source.read(result)
            if name not in given:
                continue
            if given[name].shape != rows.shape:
                shapes = f"{tuple(given[name].shape)} in the checkpoint and {tuple(rows.shape)} in the model"
                errors.append(f"size mismatch for {prefix}{name}: it is {shapes}")
                continue
            with torch.no_grad():
                rows.copy_(given[name])
        return result


def keep_names(built: nn.Module, original: Mapping[str, Tensor]) -> None:
    """Let `built` use the names of `original`, where it has other ones for these tensors."""
    now = named_tensors(built)
    all_names: dict[int, list[str]] = {}
    for name, tensor in now.items():
        all_names.setdefault(id(tensor), []).append(name)
    merged = _merged(built)
    sources: dict[str, _Source] = {}
    for name, tensor in original.items():
        if now.get(name) is tensor:
            continue
        if id(tensor) in all_names:
            sources[name] = _Source(all_names[id(tensor)][0])
        elif (source := merged.get(id(tensor))) is not None:
            sources[name] = source
    own: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys([*(source.name for source in sources.values()), *original]):
        if name in now:
            others = tuple(n for n in all_names[id(now[name])] if n not in original)
            own |= {name: others} if others else {}
    if not own:
        return
    names = Names(tuple(original), sources, own)
    built.register_state_dict_post_hook(functools.partial(names.write))  # torch marks hooks, methods cannot be
    built.register_load_state_dict_pre_hook(names.read)


def places_of(module: nn.Module, original: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, slice | None]]:
    """For each name of `original` the tensor of `module` that has its values now, and the rows of it (None: all). A
    weight that is gone is left out; one whose tensor is another now, under its old name, is that."""
    now = named_tensors(module)
    present = {id(tensor) for tensor in now.values()}
    merged = _merged(module)
    found: dict[str, tuple[Tensor, slice | None]] = {}
    for name, tensor in original.items():
        if id(tensor) in present:
            found[name] = (tensor, None)
        elif (source := merged.get(id(tensor))) is not None:
            found[name] = (now[source.name], source.rows)
        elif name in now:
            found[name] = (now[name], None)
    return found


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under each name."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        tables = (*part._parameters.items(), *part._buffers.items())
        for name, tensor in tables:
            if tensor is not None and name not in part._non_persistent_buffers_set:
                found[prefix + name] = tensor
    return found


def _merged(module: nn.Module) -> dict[int, _Source]:
    """By the identity of a parameter that was merged, where it is now."""
    found: dict[int, _Source] = {}
    for path, part in module.named_modules():
        merged = getattr(part, "merged", None)
        for name, references in merged.items() if isinstance(merged, dict) else ():
            start = 0
            for reference, rows in references:
                if (tensor := reference()) is not None:
                    found[id(tensor)] = _Source(f"{path}.{name}" if path else name, slice(start, start + rows))
                start += rows
    return found
