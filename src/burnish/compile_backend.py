"""`torch.compile(model, backend="burnish")`: the same rewrites in front of Inductor. The way to train.

Dynamo hands over the parts of a model that it can trace. Their autocast is spelled out, they are raised and fused as in
`optimize`, and given to AOTAutograd and Inductor. Where gradients flow, an Op with passes of its own is one node of the
forward and one of the backward graph, and one that is a composition is its parts, which Inductor fuses with what is
around them (see `burnish.autograd`). Each Op's Impl is chosen for the sizes at hand (see `burnish.compile_choices`).

Weights are inputs of those parts, so what needs packed weights (merged projections) is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.compile_choices import choose_impls
from burnish.graph.autocast import make_casts_explicit
from burnish.graph.trace import clean
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply
from burnish.tuning import Tuner

_NEEDS_PACKING = {"gated_mlp", "parallel linears"}
_OPTIONS = {"burnish.impls", "burnish.cache"}


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A torch.compile backend: raises and fuses Dynamo's graph, then compiles it with Inductor.

    Args:
        options: as `torch.compile(..., mode=..., options=...)` gives them: for Inductor, except `"burnish.impls"`, Impl
            names by Op name that are to be used, and `"burnish.cache"`, both as of `burnish.optimize`.

    Raises:
        ValueError: an option of ours that there is not; an Op or Impl that there is not.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    given = dict(options.get("options") or {})
    own = {name: given.pop(name) for name in list(given) if name.startswith("burnish.")}
    if unknown := own.keys() - _OPTIONS:
        raise ValueError(f"options: there is no {', '.join(sorted(unknown))}; there are {', '.join(sorted(_OPTIONS))}")
    tuner = Tuner(own.get("burnish.cache", "readwrite"), own.get("burnish.impls"))
    if mode := options.get("mode"):
        given = torch._inductor.list_mode_options(mode) | given

    def compile_inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **rest: Any) -> Any:
        choose_impls(graph_module, tuner)
        return compile_fx_inner(graph_module, example_inputs, **rest)

    rewritten, _ = rewrite(graph_module, example_inputs)
    with _without_autocast():
        compiled: Any = compile_fx(
            rewritten,
            list(example_inputs),
            inner_compile=functools.wraps(compile_fx_inner)(compile_inner),
            config_patches=given or None,
        )
    return compiled


def rewrite(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[StepRecord]]:
    """Dynamo's graph in ATen dialect with Ops in it, and what was done. It knows no autocast any more."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(given) if isinstance(given, Tensor) else given for given in example_inputs]
        trace = make_fx(graph_module, pre_dispatch=True, _allow_non_fake_inputs=True)
    else:
        fakes = [_fake(given, mode, context) for given in example_inputs]
        trace = make_fx(graph_module, pre_dispatch=True)
    with mode:
        traced = trace(*fakes)
        if torch._C._is_any_autocast_enabled() or _enters_autocast(traced):
            make_casts_explicit(traced, fakes)
    with _without_autocast():
        clean(traced)
        records = [apply("raise", RAISE, traced)]
        records.append(apply("fuse", [step for step in FUSE if step.name not in _NEEDS_PACKING], traced))
    return traced, records


def _enters_autocast(graph_module: fx.GraphModule) -> bool:
    return any(node.target is autocast_mode._enter_autocast for node in graph_module.graph.nodes)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _fake(given: Any, mode: FakeTensorMode, context: TracingContext) -> Any:
    """The fake of an input with the symbolic sizes that Dynamo chose; AOTAutograd will ask `mode` for the same one."""
    if not isinstance(given, Tensor):
        return given
    symbolic = context.tensor_to_context.get(given)
    source = getattr(symbolic, "tensor_source", None)
    return mode.from_tensor(given, symbolic_context=symbolic, source=source, static_shapes=None if symbolic else True)
