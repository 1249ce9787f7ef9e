"""The primitives as methods: of a Schedule, and of a group of them, where each runs for every member."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from burnish.scheduling.primitives import (
    Annotate,
    Checkpoint,
    Decompose,
    Fuse,
    Primitive,
    Replace,
    ReplaceAll,
    Trace,
)
from burnish.scheduling.step import Step


class Methods(ABC):
    """Each applies one primitive, adds a Step to the history, and returns it.

    Where one raises, the model and the history are as they were. `match` is what `find` returns, one result or a list;
    or a query, which is looked for in the module.
    """

    @abstractmethod
    def apply(self, primitive: Primitive) -> Step:
        """Applies a primitive as one step."""

    def replace(self, new: Any, match: Any = None, *, name: str | None = None) -> Step:
        """Puts `new` in the place of the whole module, or of matches in it.

        Args:
            new: a module, which is copied and keeps its weights; a function; or a class of modules (or another object)
                with `from_modules`, which is called with the modules that are replaced and takes over their weights.
            match: matches with the same inputs (q, k, v) become one call, which returns a tuple with one result for
                each; others are replaced one by one.
            name: of the new submodule, where a match is replaced by a module.

        Raises ValueError or TypeError where `new` or `match` do not fit.
        """
        return self.apply(Replace(new, match, name))

    def replace_all(self, kind: type[nn.Module], make: Any) -> Step:
        """Replaces every module of exactly the type `kind` by `make(old)`, which can share the old one's weights."""
        return self.apply(ReplaceAll(kind, make))

    def fuse(self, match: Any, compiler: str = "burnish", *, name: str | None = None) -> Step:
        """Makes the nodes of each match one submodule, and lets a compiler make that fast at its first call.

        Args:
            compiler: "burnish" (`burnish.optimize`), "inductor" (`torch.compile`), or "none", which only groups.
            name: of the new submodule; numbered where there are several matches.
        """
        return self.apply(Fuse(match, compiler, name))

    def decompose(self) -> Step:
        """Splits a Linear into the product and the sum with its bias, which can then be fused with what follows."""
        return self.apply(Decompose())

    def trace(self, *, flatten: bool = False) -> Step:
        """Makes the module an fx.GraphModule: `sch.mod.code` shows its steps.

        Args:
            flatten: let the forwards of submodules become part of it, except those of `torch.nn`.
        """
        return self.apply(Trace(flatten))

    def checkpoint(self) -> Step:
        """Recomputes the module's activations in the backward pass instead of keeping them."""
        return self.apply(Checkpoint())

    def annotate(self, name: str, value: Any) -> Step:
        """Writes a note on the module: `sch.annotations[name]` is then `value`."""
        return self.apply(Annotate(name, value))
