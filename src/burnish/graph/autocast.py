"""Autocast's casts as nodes of the graph, so that what rewrites it sees the dtypes that operators really get.

Which operator casts which of its inputs is not written down here: each is run on fake tensors under the autocast that
holds for it, and the casts that PyTorch makes are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.graph.regions import inline_region

_KINDS = ("cpu", "cuda")
_REGION = torch.ops.higher_order.wrap_with_autocast
_HALF_TYPES = (torch.float16, torch.bfloat16)


def autocast_dtypes() -> tuple[tuple[str, torch.dtype], ...]:
    """What autocast casts to now, by type of device; empty where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast off, on every device of ours."""
    with ExitStack() as stack:
        for kind, _ in autocast_dtypes():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def make_casts_explicit(gm: fx.GraphModule, fakes: Sequence[Any] | None = None) -> int:
    """Spell out the casts of the autocast around this call, and of the regions that the graph enters itself, in place.

    Args:
        gm: an ATen graph, composite operators kept. It computes the same with autocast switched off afterwards.
        fakes: a fake tensor, or another value, for each placeholder; by default its `meta["val"]`, which is written
            anew for all nodes.

    Returns the number of casts. ValueError for an operator whose casts can be neither seen nor imitated.
    """
    values: dict[fx.Node, Any] = {}
    cast: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    _inline_regions(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta["val"] for node in placeholders] if fakes is None else fakes
    given, mode = iter(fakes), detect_fake_mode(fakes)
    # The mode makes tensors of symbolic sizes, where an operator is given none. PyTorch 2.11 takes products of such
    # tensors only by its dispatcher in Python.
    with mode or nullcontext(), enable_python_dispatcher(), _regions() as enter_or_leave:
        for node in list(gm.graph.nodes):
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = node.meta["val"] if "val" in node.meta else _fake(_attribute(gm, str(node.target)), mode)
            elif enter_or_leave(node):
                continue
            elif node.op == "call_function":
                for inner in _checkpointed(gm, node):
                    make_casts_explicit(inner, [values[arg] for arg in node.args[1:]])
                values[node] = _explicit(gm.graph, node, values, cast)
            if node.op != "output":
                node.meta["val"] = values.get(node)
    for node in reversed(list(gm.graph.nodes)):
        if node.target in (autocast_mode._enter_autocast, autocast_mode._exit_autocast):
            gm.graph.erase_node(node)
    gm.recompile()
    return len(cast)


def has_regions(gm: fx.GraphModule) -> bool:
    """Whether `torch.export` made graphs of their own of parts that run under another autocast."""
    return bool(gm.graph.find_nodes(op="call_function", target=_REGION))


def _inline_regions(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=_REGION):
        *state, inner = node.args[:5]
        assert isinstance(inner, fx.Node)
        _inline_regions(gm.get_submodule(str(inner.target)))  # type: ignore[arg-type]
        with gm.graph.inserting_before(node):
            entered = gm.graph.call_function(autocast_mode._enter_autocast, tuple(state))
            left = gm.graph.call_function(autocast_mode._exit_autocast, (entered,))
        inline_region(gm, node, inner, node.args[5:], before=left)


def _checkpointed(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graph that a node runs under activation checkpointing."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return []
    return [_attribute(gm, str(node.args[0].target))]  # type: ignore[union-attr]


@contextmanager
def _regions() -> Iterator[Callable[[fx.Node], bool]]:
    """Follows the graph into its autocast regions. Without the cache, which would hide the second cast of a weight."""
    entered: dict[fx.Node, Any] = {}
    cached = torch.is_autocast_cache_enabled()

    def enter_or_leave(node: fx.Node) -> bool:
        if node.target is autocast_mode._enter_autocast:
            entered[node] = autocast_mode._enter_autocast(*node.args)
            torch.set_autocast_cache_enabled(False)
        elif node.target is autocast_mode._exit_autocast:
            autocast_mode._exit_autocast(entered.pop(node.args[0]))  # type: ignore[arg-type]
            torch.set_autocast_cache_enabled(False)
        else:
            return False
        return True

    torch.set_autocast_cache_enabled(False)
    try:
        yield enter_or_leave
    finally:
        for mode in reversed(entered.values()):
            autocast_mode._exit_autocast(mode)
        torch.set_autocast_cache_enabled(cached)


def _explicit(
    graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], cast: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> Any:
    """Put casts in front of the node, and return its value."""
    target: Any = node.target
    args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
    if not isinstance(target, torch._ops.OpOverload) or not torch._C._is_any_autocast_enabled():
        known = target is torch.ops.higher_order.tag_activation_checkpoint
        if isinstance(target, torch._ops.HigherOrderOperator) and not known:
            raise ValueError(f"what autocast does within {target} is not known")
        return target(*args, **kwargs)
    with _Watching() as watching:
        result = target(*args, **kwargs)
    casts = watching.casts
    if _dtypes(result) != _dtypes(_without_autocast(target, args, kwargs, casts)):
        # Softmax is told to compute in float32, on CUDA, and casts nothing: it gives the same from a float32 input.
        halves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype in _HALF_TYPES]
        casts = {id(half): torch.float32 for half in halves}
        if _dtypes(result) != _dtypes(_without_autocast(target, args, kwargs, casts)):
            raise ValueError(f"autocast does something to {target} that no cast of its inputs does")
    if not casts:
        return result

    def casted(given: fx.Node) -> fx.Node:
        dtype = casts.get(id(values[given]))
        if dtype is None:
            return given
        if (given, dtype) not in cast:
            with graph.inserting_before(node):
                new = graph.call_function(torch.ops.aten.to.dtype, (given, dtype))
            cast[given, dtype] = new
            values[new] = new.meta["val"] = values[given].to(dtype)
            new.meta |= {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return cast[given, dtype]

    node.args = fx.map_arg(node.args, casted)
    node.kwargs = fx.map_arg(node.kwargs, casted)
    return result


class _Watching(TorchDispatchMode):
    """Sees casts. `casts` has the dtype that a tensor was cast to, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (dtype := (kwargs or {}).get("dtype")) is not None:
            self.casts.setdefault(id(args[0]), dtype)
        return result


def _without_autocast(target: Any, args: Any, kwargs: Any, casts: dict[int, torch.dtype]) -> Any:
    def casted(tensor: Tensor) -> Tensor:
        dtype = casts.get(id(tensor))
        return tensor if dtype is None else tensor.to(dtype)

    args, kwargs = pytree.tree_map_only(Tensor, casted, (args, kwargs))
    devices = {t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    with torch.autocast(next(iter(devices), "cpu"), enabled=False):
        return target(*args, **kwargs)


def _dtypes(result: Any) -> list[torch.dtype]:
    return [t.dtype for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _fake(value: Any, mode: FakeTensorMode | None) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) and mode is not None else value


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    owner: Any = gm
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner
