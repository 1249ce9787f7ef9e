"""The tracer of a Schedule: it inlines what it is told to, and knows from example inputs how long shapes are."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from burnish.scheduling.snapshot import Snapshot

PARENT = "parent_module"  # meta key, as in graph/nested.py: path of the module whose forward made the call
_VALUE = "val"
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Example:
    """What a tensor was like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Example:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def fake(self, mode: FakeTensorMode) -> Tensor:
        with mode:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Known:
    """What is known of a call: the arguments that are constants in it, and examples of the others, which are inputs of
    the graph."""

    constants: Mapping[str, Any]
    examples: Mapping[str, Any] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """Knows how long a shape is."""

    def __getattr__(self, k: str) -> Any:
        if k == "shape" and isinstance(self.node.meta.get(_VALUE), Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __len__(self) -> int:
        value = self.node.meta.get(_VALUE)
        return len(value) if isinstance(value, (tuple, list)) else super().__len__()


class PartTracer(fx.Tracer):
    """Notes on every node whose forward it came from.

    Where there are examples of all that a value depends on, `*x.shape[:-1]` can be traced: how many sizes there are is
    known. The sizes themselves stay values of the graph.
    """

    def __init__(self, inlined: set[int], known: Known) -> None:
        """`inlined`: identities of the modules whose forward becomes part of the graph."""
        super().__init__()
        self._inlined, self._known = inlined, known
        self._paths = [""]
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True) if known.examples else None
        self._evaluating = False

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = super().trace(*args, **kwargs)
        for node in graph.nodes:  # the sizes of the examples must not become part of anything
            node.meta.pop(_VALUE, None)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._inlined

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._paths.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self._paths.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._evaluating:
            raise RuntimeError("nothing is recorded of what is only evaluated")
        node = super().create_node(*args, **kwargs)
        node.meta[PARENT] = self._paths[-1]
        if self._fakes is not None:
            self._evaluating = True
            try:
                self._evaluate(node, self._fakes)
            except Exception:  # what cannot be computed without values stays unknown
                pass
            finally:
                self._evaluating = False
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """By the signature, not by the code as fx does it: forwards may be decorated. Constants are given as such."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            name = _STARS.get(parameter.kind, "") + parameter.name
            default = () if parameter.default is parameter.empty else (parameter.default,)
            value = self.create_proxy("placeholder", name, default, {})
            value = self._known.constants.get(name, value)
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                kwargs.update(value if parameter.kind is parameter.VAR_KEYWORD else {parameter.name: value})

        def call() -> Any:
            return root_fn(self.root, *args, **kwargs)

        call.__annotations__ = {}  # fx would write "Any" into the graph's code
        return call, ()

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = obj.node.meta.get(_VALUE)
        if isinstance(value, (tuple, list)):
            return (self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(len(value)))
        return super().iter(obj)

    def _evaluate(self, node: fx.Node, fakes: FakeTensorMode) -> None:
        """Notes what the node would compute on the examples, without computing it."""
        if node.op == "placeholder":
            if (example := self._known.examples.get(str(node.target))) is not None:
                node.meta[_VALUE] = pytree.tree_map_only(Example, lambda e: e.fake(fakes), example)
            return
        call: Any = map_arg((node.args, node.kwargs), lambda n: n.meta[_VALUE])
        args, kwargs = call
        target: Any = node.target
        with fakes, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the module runs
            if node.op == "call_function":
                node.meta[_VALUE] = target(*args, **kwargs)
            elif node.op == "call_method":
                node.meta[_VALUE] = getattr(args[0], target)(*args[1:], **kwargs)
            elif node.op == "call_module":
                module = self.root.get_submodule(target)
                before = Snapshot.take(module)  # it may keep what it computes
                try:
                    node.meta[_VALUE] = module(*args, **kwargs)
                finally:
                    before.restore()
            elif node.op == "get_attr":
                tensors = dict(self.root.named_parameters()) | dict(self.root.named_buffers())
                node.meta[_VALUE] = fakes.from_tensor(tensors[target])
