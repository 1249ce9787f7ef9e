"""The primitives as methods: of a Schedule, and of a group of them, where each runs for every member."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from burnish.quantize import Kind
from burnish.rewrites import Rewrite
from burnish.scheduling.primitives import (
    Annotate,
    Checkpoint,
    CutPipelineStage,
    Decompose,
    Fuse,
    Optimize,
    Primitive,
    Quantize,
    Replace,
    ReplaceAll,
    Shard,
    Sync,
    TensorParallel,
    Trace,
)
from burnish.scheduling.step import Step
from burnish.tuning import CacheMode


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

    def optimize(
        self,
        *,
        verify: bool = True,
        impls: Mapping[str, str] | None = None,
        cache: CacheMode = "readwrite",
        cuda_graphs: str = "auto",
        static_outputs: bool = False,
        quantize: Kind | None = None,
        rewrites: Sequence[Rewrite] = (),
        without: Sequence[str] = (),
        padding: str = "keep",
    ) -> Step:
        """Has `build` give a model as `burnish.optimize` does, whose arguments these are.

        Args:
            without: default steps ("raise", "fuse", "pack") and rewrites, by name, that are to be left out.
        """
        given = Optimize(
            verify, impls or {}, cache, cuda_graphs, static_outputs, quantize, tuple(rewrites), tuple(without), padding
        )
        return self.apply(given)

    def annotate(self, name: str, value: Any) -> Step:
        """Writes a note on the module: `sch.annotations[name]` is then `value`."""
        return self.apply(Annotate(name, value))

    def quantize(self, kind: Kind = "int8") -> Step:
        """Stores the weights of the module's Linears in 8 or 4 bits: "int8", "int4" or "fp8". For inference."""
        return self.apply(Quantize(kind))

    def shard(self, name: str, axis: int, mesh: Any = None) -> Step:
        """Cuts a parameter, so that each rank of torch.distributed holds its slice.

        Args:
            name: of the parameter, such as "weight".
            axis: 0 for output features of a Linear's weight (and its bias), 1 for input features.
            mesh: among whom: a DeviceMesh of one dimension, a process group, or None for all processes.

        Raises ValueError where its size does not divide.
        """
        return self.apply(Shard(name, axis, mesh))

    def sync(self, when: str, op: str, mesh: Any = None, *, axis: int | None = None) -> Step:
        """Has a collective done before or behind the module; `burnish.parallel.sync` has a table of all.

        Args:
            when: "fwd_post" (the result), "fwd_pre" (the input), "bwd_post" (the gradient of the input).
            op: "all_reduce", "all_gather", "reduce_scatter" or "own_slice".
        """
        return self.apply(Sync(when, op, mesh, axis))

    def tensor_parallel(
        self, mesh: Any = None, plan: Mapping[str, str] | None = None, *, sequence_parallel: bool = False
    ) -> Step:
        """Divides the module among the ranks by its plan (Hugging Face's, `plan`, or by its layers' names), with the
        collectives that it needs. See `burnish.parallel.tensor_parallel`; the model that was given stays whole."""
        return self.apply(TensorParallel(mesh, plan, sequence_parallel))

    def cut_pipeline_stage(self) -> Step:
        """Ends a stage of a pipeline behind the module; `build_pipeline` splits the model there."""
        return self.apply(CutPipelineStage())
