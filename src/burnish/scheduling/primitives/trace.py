"""`trace`: a module as a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx, nn

from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.tracing import TracedModule, calls_more_than_forward, finish, trace_variants

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule


@register
@dataclass(frozen=True)
class Trace(Primitive):
    """Makes the module an fx.GraphModule, whose steps `sch.mod.code` shows.

    Submodules stay whole, as calls in the graph. With `flatten` their forwards become part of it, except those of
    `torch.nn`, and of modules that have hooks or are checkpointed.
    """

    verb: ClassVar[str] = "trace"
    flatten: bool = False

    def check(self, schedule: Schedule) -> TracedModule:
        module = schedule.mod
        inlined = _non_leaves(module) if self.flatten else []
        gm = trace_variants(module, schedule.path, inlined, schedule.known_call(module))[0]
        schedule.check_graphs({module: gm})
        return gm

    def apply(self, schedule: Schedule, plan: TracedModule) -> int:
        finish(plan)
        schedule.tree.put(schedule.mod, plan)
        return 1


def _non_leaves(module: nn.Module, prefix: str = "") -> list[str]:
    tracer, paths = fx.Tracer(), []
    for name, child in module.named_children():
        if not calls_more_than_forward(child) and not tracer.is_leaf_module(child, name):
            paths += [prefix + name, *_non_leaves(child, f"{prefix}{name}.")]
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            paths += _non_leaves(child, f"{prefix}{name}.")
    return paths
