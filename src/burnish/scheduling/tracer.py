"""The tracer of a Schedule: it inlines what it is told to, and knows from example inputs how long shapes are."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from burnish.scheduling.objects import Opaque, expect_answer, is_opaque, recorded_caches
from burnish.scheduling.sizes import HINT, Condition, Sizes, recorded_factories
from burnish.scheduling.snapshot import Snapshot

PARENT = "parent_module"  # meta key, as in graph/nested.py: path of the module whose forward made the call
_VALUE = "val"
UNKNOWN = object()
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


@dataclass(frozen=True)
class Known:
    """What is known of a call: the arguments that are constants in it, and examples of the others, which are inputs of
    the graph."""

    constants: Mapping[str, Any]
    examples: Mapping[str, Any] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """Knows what its value is for the examples, where that can be told without computing."""

    def __getattr__(self, k: str) -> Any:
        if k in ("shape", "ndim"):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __len__(self) -> int:
        value = self.tracer.known_value(self.node)  # type: ignore[attr-defined]
        return len(value) if isinstance(value, (tuple, list, dict)) else super().__len__()

    def __index__(self) -> int:
        return self.tracer.number(self)  # type: ignore[attr-defined]

    __int__ = __index__

    def __contains__(self, key: Any) -> bool:
        value = self.tracer.known_value(self.node)  # type: ignore[attr-defined]
        if isinstance(value, dict):
            return key in value
        return any(bool(item == key) for item in self)


class _ObjectProxy(_Proxy):
    """Is an instance of the object's class to who asks."""

    def __init__(self, node: fx.Node, tracer: Any, kind: type) -> None:
        super().__init__(node, tracer)
        self.__dict__["_kind"] = kind

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__["_kind"]


class PartTracer(fx.Tracer):
    """Notes on every node whose forward it came from.

    Where there are examples of all that a value depends on, `*x.shape[:-1]` can be traced: how many sizes there are is
    known. The sizes themselves stay values of the graph. Where the forward asks about one, `conditions` has the answer.
    """

    def __init__(self, inlined: set[int], known: Known) -> None:
        """`inlined`: identities of the modules whose forward becomes part of the graph."""
        super().__init__()
        self._inlined, self._known = inlined, known
        self._paths = [""]
        self._sizes = Sizes() if known.examples else None
        self._evaluating = False
        self._asked: list[fx.Node] = []
        self._objects: dict[fx.Node, type] = {}
        self.proxy_buffer_attributes = self._sizes is not None  # a slice of one by a size is a step of the graph

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What must hold of a call, so that the graph computes what the module would."""
        return () if self._sizes is None else self._sizes.conditions

    @property
    def innermost(self) -> nn.Module:
        """The module whose forward was running when an error came."""
        return self._traced.get_submodule(self._paths[-1])

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._traced: nn.Module = root
        if self._sizes is None:
            return super().trace(root, concrete_args)
        with recorded_factories(self._record), recorded_caches(root, self._make_object):
            graph = super().trace(root, concrete_args)
        _drop_unread(graph, self._asked)
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
        if self._sizes is None:
            return super().proxy(node)
        example = self._known.examples.get(str(node.target)) if node.op == "placeholder" else None
        if isinstance(example, Opaque):
            self._objects[node] = example.kind
            return _ObjectProxy(node, self, example.kind)
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._evaluating:
            raise RuntimeError("nothing is recorded of what is only evaluated")
        node = super().create_node(*args, **kwargs)
        node.meta[PARENT] = self._paths[-1]
        if node.name == "self":  # of BERT's submodule `self`: in the graph's code it would hide the module
            node._rename("self_")
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
            if name in self._known.examples and parameter.kind in _STARS:
                value = self._spread(value, self._known.examples[name])
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
        value = self.known_value(obj.node)
        if isinstance(value, (tuple, list)):
            return (self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(len(value)))
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.known_value(obj.node)
        if self._sizes is None or value is UNKNOWN or isinstance(value, Tensor):
            return super().to_bool(obj)
        if self._comes_from_object(obj.node):
            return self._answer(obj, bool(value))
        self._asked.append(obj.node)
        return self._sizes.truth(value, obj.node)

    def number(self, obj: fx.Proxy) -> int:
        """What an integer is for the examples. TypeError where that is not known."""
        value = self.known_value(obj.node)
        if self._sizes is None or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{obj.node.name} is needed as a number, and is none yet when the module is traced")
        if self._comes_from_object(obj.node):
            return self._answer(obj, int(value))
        self._asked.append(obj.node)
        return self._sizes.number(value, obj.node)

    def _comes_from_object(self, node: fx.Node) -> bool:
        """Whether a cache was asked, and not the sizes of a tensor."""
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current in self._objects:
                return True
            if not isinstance(self.known_value(current), Tensor):
                fresh = [n for n in current.all_input_nodes if n not in seen]
                seen.update(fresh)
                pending += fresh
        return False

    def _answer(self, obj: fx.Proxy, answer: Any) -> Any:
        question = obj.node.args[1] if obj.node.target is getattr else obj.node.name
        self.create_proxy("call_function", expect_answer, (obj, answer, str(question)), {})
        return answer

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and dataclasses.is_dataclass(a):  # Hugging Face's outputs, which fx would make dicts
            values = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a)}
            given = {name: value for name, value in values.items() if value is not None}
            return self.create_node("call_function", type(a), (), given)
        if self._sizes is not None and is_opaque(a):  # a cache is made for the model's config
            for path, module in self.root.named_modules():
                for name, value in vars(module).items():
                    if value is a:
                        return self.create_node("get_attr", f"{path}.{name}" if path else name, (), {})
        return super().create_arg(a)

    def _spread(self, value: Any, examples: Any) -> Any:
        """The items of `*args` or `**kwargs`: tensors as values of the graph, the others as they are."""
        keys = list(examples) if isinstance(examples, dict) else list(range(len(examples)))
        variable = {key for key in keys if any(map(_is_stand_in, pytree.tree_leaves(examples[key])))}
        constants = {key: examples[key] for key in keys if key not in variable}
        self.create_proxy("call_function", expect_items, (value, keys, constants), {})
        items = {key: value[key] if key in variable else examples[key] for key in keys}
        return items if isinstance(examples, dict) else tuple(items.values())

    def _make_object(self, kind: type, args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return kind(*args, **kwargs)
        made = self.create_proxy("call_function", kind, args, kwargs)
        self._objects[made.node] = kind
        return _ObjectProxy(made.node, self, kind)

    def _record(self, function: Any, args: Any, kwargs: Any) -> fx.Proxy:
        if self._evaluating:
            raise RuntimeError("nothing is recorded of what is only evaluated")
        return self.create_proxy("call_function", function, args, kwargs)

    def known_value(self, node: fx.Node) -> Any:
        """What the node would compute on the examples, found without computing; `UNKNOWN` where it cannot be told.

        Found when it is first asked for, because few values are: a layer of BERT takes a second of symbolic sizes.
        """
        if self._sizes is None:
            return UNKNOWN
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if _VALUE not in n.meta]
            if _VALUE in current.meta or not missing:
                pending.pop()
                if _VALUE not in current.meta:
                    current.meta[_VALUE] = self._evaluated(current, self._sizes)
            else:
                pending += missing
        return node.meta[_VALUE]

    def _evaluated(self, node: fx.Node, sizes: Sizes) -> Any:
        if any(n.meta[_VALUE] is UNKNOWN for n in node.all_input_nodes):
            return UNKNOWN
        self._evaluating = True
        try:
            return self._evaluate(node, sizes)
        except Exception:  # what cannot be computed without values stays unknown
            return UNKNOWN
        finally:
            self._evaluating = False

    def _evaluate(self, node: fx.Node, sizes: Sizes) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            example = self._known.examples.get(target, UNKNOWN)
            return example if example is UNKNOWN else _faked(example, sizes, target, ())
        call: Any = map_arg((node.args, node.kwargs), lambda n: n.meta[_VALUE])
        args, kwargs = call
        with sizes.fakes, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the module runs
            if node.op == "call_function":
                return _SHORTCUTS.get(target, target)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if node.op == "call_module":
                module = self.root.get_submodule(target)
                before = Snapshot.take(module)  # it may keep what it computes
                try:
                    return module(*args, **kwargs)
                finally:
                    before.restore()
            if node.op == "get_attr":
                tensors = dict(self.root.named_parameters()) | dict(self.root.named_buffers())
                if target not in tensors:
                    path, _, name = target.rpartition(".")
                    return vars(self.root.get_submodule(path))[name]
                return sizes.fakes.from_tensor(tensors[target], static_shapes=True)
        return UNKNOWN


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


# PyTorch follows symbolic sizes through attention's every step, in half a second.
_SHORTCUTS: dict[Any, Callable[..., Any]] = {F.scaled_dot_product_attention: _attention}


def expect_items(items: Any, keys: list[Any], constants: dict[Any, Any]) -> None:
    """ValueError where `*args` or `**kwargs` have other items than when the module was captured, or other constants."""
    if isinstance(items, fx.Proxy):
        items.tracer.create_proxy("call_function", expect_items, (items, keys, constants), {})
        return
    given = list(items) if isinstance(items, dict) else list(range(len(items)))
    if set(given) != set(keys):
        raise ValueError(f"the module was captured for further arguments {list(keys)} and got {given}; {HINT}")
    for key, constant in constants.items():
        if items[key] is not constant and items[key] != constant:
            raise ValueError(f"{key}: the module was captured for {constant!r} and got {items[key]!r}; {HINT}")


def _is_stand_in(leaf: Any) -> bool:
    return isinstance(leaf, (Example, Opaque))


def _faked(example: Any, sizes: Sizes, name: str, path: tuple[Any, ...]) -> Any:
    """The example with a fake tensor in the place of each tensor."""
    if isinstance(example, Example):
        return sizes.fake(example.shape, example.dtype, example.device, name, path)
    if isinstance(example, (tuple, list)) and not hasattr(example, "_fields"):
        return type(example)(_faked(item, sizes, name, (*path, i)) for i, item in enumerate(example))
    if type(example) in (dict, OrderedDict):
        return type(example)((key, _faked(item, sizes, name, (*path, key))) for key, item in example.items())
    if isinstance(example, Opaque):
        with sizes.fakes:
            return example.fake(lambda e: sizes.fake(e.shape, e.dtype, e.device, name, None))
    if any(map(_is_stand_in, pytree.tree_leaves(example))):
        raise ValueError(f"{name} holds tensors in a {type(example).__name__}")
    return example


def _only_asks(node: fx.Node) -> bool:
    """Whether it is arithmetic with sizes and other attributes, and changes nothing."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    arithmetic = node.target is getattr or getattr(node.target, "__module__", "") in ("_operator", "math")
    return node.op == "call_function" and arithmetic


def _drop_unread(graph: fx.Graph, asked: list[fx.Node]) -> None:
    """Removes the steps that led to answers which are conditions now."""
    pending = [*asked]
    while pending:
        node = pending.pop()
        if not node._erased and not node.users and _only_asks(node):
            pending += node.all_input_nodes
            graph.erase_node(node)
