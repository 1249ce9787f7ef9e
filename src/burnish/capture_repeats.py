"""Faster tracing of models that repeat themselves: the results of calls like earlier ones are looked up.

All of the model's code runs, and every call becomes a node, as ever. Only the arithmetic about sizes is spared. That
takes private parts of torch; where a version lacks one, everything is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.node import map_aggregate

from burnish.capture_overhead import replaced
from burnish.graph.results import Call, Result, Results, Unlike

_PRIVATE = ("proxy_call", "fetch_sym_proxy", "extract_val", "_ProxyTensor")  # of `proxy_tensor`


class Repeats:
    """In place of torch's `proxy_call`, which traces one call of an operator.

    Attributes:
        found: how many calls were looked up.
    """

    def __init__(self, proxy_call: Any) -> None:
        self.found = 0
        self._proxy_call = proxy_call
        self._tracer: Any = None
        self._results = Results()

    def __call__(self, mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:
        tracer = mode.tracer
        self._tracer = self._tracer or tracer
        try:
            call = self._results.call(func, args, kwargs)
        except Unlike:
            call = None
        if call is None or tracer is not self._tracer or any(_is_constant(t, tracer) for t in call.tensors):
            return self._proxy_call(mode, func, pre_dispatch, args, kwargs)
        if (result := self._results.find(call)) is not None:
            self.found += 1
            return _repeat(result, call, tracer, func, args, kwargs)
        before = _last_node(tracer)
        made = self._proxy_call(mode, func, pre_dispatch, args, kwargs)
        node = _last_node(tracer)
        if node.prev is before and node.target is func and _is_repeatable(made, node, tracer):
            self._results.keep(call, made, tensor_meta=node.meta.get("tensor_meta"))
        return made


@contextlib.contextmanager
def repeats_looked_up() -> Iterator[Repeats]:
    """Within the `with`, tracing looks up what it can."""
    repeats = Repeats(getattr(proxy_tensor, "proxy_call", None))
    if not all(hasattr(proxy_tensor, name) for name in _PRIVATE):
        yield repeats
        return
    with replaced(proxy_tensor, "proxy_call", repeats):
        yield repeats


def _last_node(tracer: Any) -> Any:
    return next(iter(reversed(tracer.graph.nodes)))


def _is_constant(tensor: Tensor, tracer: Any) -> bool:
    """Whether the tracer knows the tensor's values, or does not know the tensor."""
    slot = tracer.tensor_tracker.get(tensor)
    return slot is None or slot.constant is not None


def _is_repeatable(made: Any, node: Any, tracer: Any) -> bool:
    if made is None:
        return True
    return (
        type(made) is FakeTensor
        and not made.requires_grad
        and not _is_constant(made, tracer)
        and "unbacked_bindings" not in node.meta
    )


def _repeat(result: Result, call: Call, tracer: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What `proxy_call` does, with the result known."""
    size = proxy_tensor.fetch_sym_proxy(tracer)

    def traced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tracer.tensor_tracker[value].proxy
        return size(value) if isinstance(value, SymInt) else value

    name = tracer.graph._target_to_str(func.overloadpacket.__name__)
    proxy = tracer.create_proxy("call_function", func, *map_aggregate((args, kwargs), traced), name=name)
    made = result.again(call)
    if made is not None:
        proxy.node.meta |= {"val": proxy_tensor.extract_val(made), "tensor_meta": result.about["tensor_meta"]}
        tracer.tensor_tracker[made] = proxy_tensor._ProxyTensor(proxy, None)
    return made
