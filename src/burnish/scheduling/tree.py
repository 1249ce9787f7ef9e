"""The module tree of a Schedule: what is where, and what takes another's place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn


def join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name


def common_path(paths: Iterable[str]) -> str:
    """The path of the innermost module that contains all of these (which may be one of them)."""
    first, *others = (path.split(".") if path else [] for path in paths)
    shared = len(first)
    for other in others:
        same = [a == b for a, b in zip(first, other, strict=False)]
        shared = min(shared, same.index(False) if False in same else len(same))
    return ".".join(first[:shared])


class Tree(nn.Module):
    """Holds the scheduled model, so that the model itself can be replaced like every other module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def at(self, path: str) -> nn.Module:
        """The module at `path`. KeyError, with the names that are there, where there is none."""
        module: nn.Module = self.model
        parts = path.split(".") if path else []
        for i, part in enumerate(parts):
            child = module._modules.get(part)
            if child is None:
                names = [name for name, value in module._modules.items() if value is not None]
                near = difflib.get_close_matches(part, names, n=3) or names[:8]
                inside = ".".join(parts[:i]) or type(module).__name__
                raise KeyError(f"{path!r}: {inside} has no {part!r}; it has {', '.join(near) or 'no submodules'}")
            module = child
        return module

    def has(self, path: str) -> bool:
        try:
            self.at(path)
        except KeyError:
            return False
        return True

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """`new` in every place where `old` is."""
        for parent in list(self.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new

    def names(self) -> Iterator[str]:
        return (path for path, _ in self.model.named_modules(remove_duplicate=False) if path)
