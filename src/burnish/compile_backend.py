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
from torch._guards import detect_fake_mode
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
    fakes = [_fake(node, given) for node, given in zip(_placeholders(graph_module), example_inputs, strict=True)]
    mode = detect_fake_mode(fakes)
    if mode is None:
        traced = make_fx(graph_module, pre_dispatch=True, tracing_mode="fake")(*fakes)
    else:
        with mode:
            traced = make_fx(graph_module, pre_dispatch=True)(*fakes)
    clean(traced)
    records = [apply("raise", RAISE, traced)]
    records.append(apply("fuse", [step for step in FUSE if step.name not in _NEEDS_PACKING], traced))
    return traced, records


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _fake(node: fx.Node, given: Any) -> Any:
    """Dynamo's fake value of an input where it left one: it carries the symbolic sizes."""
    value = node.meta.get("example_value", given)
    return value if isinstance(value, (Tensor, torch.SymInt)) else given
