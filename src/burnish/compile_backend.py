"""`torch.compile(model, backend="burnish")`: the same rewrites in front of Inductor.

For models that `torch.export` cannot take as one graph: Dynamo hands over the parts that it can. Weights are inputs of
those parts, so what needs packed weights (merged projections) is left out; everything else is raised and fused as in
`optimize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.graph.trace import clean
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply

_NEEDS_PACKING = {"gated_mlp", "parallel linears"}


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A torch.compile backend: raises and fuses Dynamo's graph, then compiles it with Inductor.

    Args:
        options: passed on to Inductor (`torch.compile(..., mode=..., options=...)`).
    """
    from torch._inductor.compile_fx import compile_fx

    rewritten, _ = rewrite(graph_module, example_inputs)
    patches = dict(options.get("options") or {})
    if mode := options.get("mode"):
        patches = torch._inductor.list_mode_options(mode) | patches
    compiled: Any = compile_fx(rewritten, list(example_inputs), config_patches=patches or None)
    return compiled


def rewrite(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[StepRecord]]:
    """Dynamo's graph in ATen dialect with Ops in it, and what was done."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        trace = make_fx(graph_module, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)
        traced = trace(*example_inputs)
    else:
        fakes = [_fake(given, mode, context) for given in example_inputs]
        with mode:
            traced = make_fx(graph_module, pre_dispatch=True)(*fakes)
    clean(traced)
    records = [apply("raise", RAISE, traced)]
    records.append(apply("fuse", [step for step in FUSE if step.name not in _NEEDS_PACKING], traced))
    return traced, records


def _fake(given: Any, mode: FakeTensorMode, context: TracingContext) -> Any:
    """The fake of an input with the symbolic sizes that Dynamo chose; AOTAutograd will ask `mode` for the same one."""
    if not isinstance(given, Tensor):
        return given
    symbolic = context.tensor_to_context.get(given)
    source = getattr(symbolic, "tensor_source", None)
    return mode.from_tensor(given, symbolic_context=symbolic, source=source, static_shapes=None if symbolic else True)
