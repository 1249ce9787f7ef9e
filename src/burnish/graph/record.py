"""Run a replacement on proxies for one match and record what it calls, without touching the graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_aggregate, map_arg

from burnish.graph.leaves import LeafCall
from burnish.graph.matcher import Match
from burnish.graph.prepare import Pattern
from burnish.graph.recording import Recording, path_of
from burnish.graph.results import compute
from burnish.graph.trace import signature_of
from burnish.graph.value_proxy import ValueProxy

_INHERITED = ("nn_module_stack", "stack_trace")
_UNKNOWN_TO_FAKES = (
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
)


@dataclass(frozen=True)
class Replacement:
    """A replacement whose signature fits the pattern."""

    fn: Callable[..., Any] | nn.Module
    name: str
    signature: inspect.Signature
    pattern: Pattern

    @classmethod
    def of(cls, fn: Callable[..., Any] | nn.Module, pattern: Pattern) -> Replacement:
        """Check the parameter names against the pattern's.

        Raises TypeError where `fn` is no function or module, ValueError where it asks for what the pattern lacks.
        """
        if not callable(fn):
            raise TypeError(f"replacement must be a function or a module, got {type(fn).__name__}")
        name = getattr(fn, "__name__", type(fn).__name__)
        signature = signature_of(fn)
        known = [*pattern.parameters, *pattern.fixed]
        weights = {str(n.target) for n in pattern.gm.graph.nodes if n.op == "get_attr"}
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise ValueError(f"replacement {name}: *{parameter.name} cannot be bound by name; name the parameters")
            asks = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if asks and parameter.name not in (*known, *weights) and not _wants_match(parameter):
                raise ValueError(
                    f"replacement {name}: parameter {parameter.name} is none of the pattern's ({', '.join(known)}) "
                    "and has no default"
                )
        return cls(fn, name, signature, pattern)

    def record(self, gm: fx.GraphModule, matches: Sequence[Match]) -> list[Recording]:
        """Call the replacement with proxies for each match's nodes. Its own errors pass through; `gm` stays as it
        is."""
        recordings = _Recorder(gm, self).record(matches) if matches else []
        for match, recording in zip(matches, recordings, strict=True):
            for old, new in zip(match.outputs, recording.outputs, strict=True):
                _check_output(self.name, old, new)
        return recordings


def _wants_match(parameter: inspect.Parameter) -> bool:
    return parameter.name == "match" and parameter.kind is parameter.KEYWORD_ONLY


class _Root(nn.Module):
    """Holds the replacement while it is traced, so that its submodules and weights have paths."""

    def __init__(self, call: Callable[[], Any], fn: Any) -> None:
        super().__init__()
        self.call = call
        if isinstance(fn, nn.Module):
            self.inner = fn

    def forward(self) -> Any:
        return self.call()


class _Recorder(fx.Tracer):
    """Records one replacement for all of its matches in one go: preparing fx for tracing takes longer than a call."""

    def __init__(self, gm: fx.GraphModule, replacement: Replacement) -> None:
        super().__init__()
        self.gm, self.replacement = gm, replacement
        self.match: Match
        self.recording: Recording
        self.fake_mode: fake_tensor.FakeTensorMode | None
        self._proxies: dict[fx.Node, fx.Proxy] = {}
        self._parameters: dict[str, fx.Proxy] = {}
        self._outside: dict[int, tuple[str, nn.Module]] = {}

    def record(self, matches: Sequence[Match]) -> list[Recording]:
        done: list[tuple[Match, fx.Graph, Recording]] = []

        def call_for_each() -> tuple[()]:
            whole = self.graph
            for match in matches:
                self._begin(match)
                self.recording.outputs += [proxy.node for proxy in self._call()]
                done.append((match, self.graph, self.recording))
            self.graph = whole
            return ()

        self.trace(_Root(call_for_each, self.replacement.fn))
        for match, graph, recording in done:
            self.match, self.recording = match, recording
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr") and node not in recording.targets:
                    self._locate(node)
                if node.op != "placeholder" and node not in recording.inputs:
                    recording.nodes.append(node)
        return [recording for _, _, recording in done]

    def _begin(self, match: Match) -> None:
        """Gives the match a graph of its own, and forgets what belongs to that of the match before."""
        self.match, self.graph = match, fx.Graph(tracer_cls=type(self))
        self.recording = Recording([], {}, [], {})
        self.fake_mode = next(_fake_modes(match), None)
        self._proxies, self._parameters = {}, {}

    # --- calling the replacement --------------------------------------------------------------------------------------

    def _call(self) -> tuple[fx.Proxy, ...]:
        values = {**self.match.attributes, **self.match.bindings}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, parameter in self.replacement.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update({n: self._proxied(v) for n, v in self.match.bindings.items() if n not in kwargs})
            elif _wants_match(parameter):
                kwargs[name] = self.match
            elif name in values:
                if parameter.kind is parameter.POSITIONAL_ONLY:
                    args.append(self._proxied(values[name]))
                else:
                    kwargs[name] = self._proxied(values[name])
        target: Any = self.root.inner if isinstance(self.replacement.fn, nn.Module) else self.replacement.fn
        return self._results(target(*args, **kwargs))

    def _proxied(self, value: Any) -> Any:
        def proxied(leaf: Any) -> Any:
            return self._input(leaf) if isinstance(leaf, fx.Node) else leaf

        return map_aggregate(value, proxied)

    def _input(self, node: fx.Node) -> fx.Proxy:
        if node not in self._proxies:
            scratch = super().create_node("placeholder", node.name, (), {})
            scratch.meta.update({k: node.meta[k] for k in ("val",) if k in node.meta})
            self.recording.inputs[scratch] = node
            self._proxies[node] = self.proxy(scratch)
        return self._proxies[node]

    def _results(self, returned: Any) -> tuple[fx.Proxy, ...]:
        results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        wanted = len(self.match.outputs)
        if len(results) != wanted:
            raise ValueError(
                f"replacement {self.replacement.name}: returns {len(results)} values, the pattern returns {wanted}"
            )
        for result in results:
            if not isinstance(result, fx.Proxy):
                raise ValueError(
                    f"replacement {self.replacement.name}: must return what it computes or an input, "
                    f"got {type(result).__name__}"
                )
        return results

    # --- fx.Tracer's hooks --------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return super().getattr(attr, attr_val, self._parameters)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if path_of(self.gm, m) is not None:
            return True
        # An exported graph has no module calls; a replacement's own modules are written out in it.
        return not self.replacement.pattern.from_examples and super().is_leaf_module(m, module_qualified_name)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:  # a module that the function closes over: the model's own, or one that it brings along
            return self._outside.setdefault(id(mod), (f"outside{len(self._outside)}", mod))[0]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, fake_tensor.FakeTensor):
            known = any(a is t for t in (*self.root.parameters(), *self.root.buffers()))
            if not known and (isinstance(a, nn.Parameter) or path_of(self.gm, a) is not None):
                name = f"_outside_tensor{len(self.root._buffers)}"
                self.root.register_buffer(name, a)
                return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        path = None
        if isinstance(target, LeafCall):
            path = self._matched_module(target.label)
            kind, target, name = "call_module", path, None
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if path is not None:
            self.recording.targets[node] = path
        if kind not in ("placeholder", "output"):
            origin = self.match.outputs[0].meta
            node.meta.update({k: origin[k] for k in _INHERITED if k in origin})
            self._compute_value(node)
        return node

    def _matched_module(self, name: str) -> str:
        path = self.match.modules.get(name, name)
        if path not in dict(self.gm.named_modules()):
            raise ValueError(
                f"replacement {self.replacement.name}: {name!r} is neither in the pattern nor a submodule of the model"
            )
        return path

    # --- values -------------------------------------------------------------------------------------------------------

    def _compute_value(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        # A module cannot run while its calls are being recorded; nodes after it go without a value.
        if self.fake_mode is None or node.op == "call_module" or any("val" not in n.meta for n in inputs):
            return
        args, kwargs = (map_arg(a, lambda n: n.meta["val"]) for a in (node.args, node.kwargs))
        try:
            with self.fake_mode, torch.no_grad():
                node.meta["val"] = self._run(self.fake_mode, node, args, kwargs)
        except _UNKNOWN_TO_FAKES:
            return
        except Exception as error:
            shapes = ", ".join(_describe(n.meta["val"]) for n in inputs)
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"replacement {self.replacement.name}: {node.name} fails on ({shapes}) of the match at "
                f"{self.match.anchor.name}: {first_line}"
            ) from error

    def _run(self, fake_mode: fake_tensor.FakeTensorMode, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return compute(node.target, args, kwargs)  # type: ignore[arg-type]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        matched = self.match.attributes.get(str(node.target).removeprefix("inner."))
        if matched is not None and "val" in matched.meta:
            return matched.meta["val"]
        value = self._value_at(node)
        return fake_mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

    def _value_at(self, node: fx.Node) -> Any:
        path = str(node.target)
        if node in self.recording.targets:
            return self.gm.get_submodule(self.recording.targets[node])
        for name, module in self._outside.values():
            if name == path:
                return module
        value: Any = self.root
        for part in path.split("."):
            # Not getattr: while tracing, fx answers it with proxies.
            tables = (
                (value._modules, value._parameters, value._buffers, vars(value)) if isinstance(value, nn.Module) else ()
            )
            value = next((table[part] for table in tables if part in table), None)
        return value

    # --- where modules and weights live -------------------------------------------------------------------------------

    def _locate(self, node: fx.Node) -> None:
        """Decide whether a module or tensor that the replacement uses is the match's, the model's, or new."""
        value, recording = self._value_at(node), self.recording
        path = str(node.target)
        own = path.removeprefix("inner").removeprefix(".") or type(value).__name__.lower()
        if node.op == "get_attr" and own in self.match.attributes:
            recording.inputs[node] = self.match.attributes[own]
        elif node.op == "call_module" and own in self.match.modules:
            recording.targets[node] = self.match.modules[own]
        elif (known := path_of(self.gm, value)) is not None:
            recording.targets[node] = known
        else:
            outside = path.startswith(("outside", "_outside_tensor", "_tensor_constant"))
            recording.added[node] = (type(value).__name__.lower() if outside else own, value)


def _fake_modes(match: Match) -> Iterator[fake_tensor.FakeTensorMode]:
    for node in (*match.nodes, *(n for m in match.nodes for n in m.all_input_nodes)):
        value = node.meta.get("val")
        if isinstance(value, fake_tensor.FakeTensor):
            yield value.fake_mode


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return str(value)


def _check_output(name: str, old: fx.Node, new: fx.Node) -> None:
    before, after = old.meta.get("val"), new.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return
    differs = before.dtype != after.dtype or before.dim() != after.dim()
    if differs or any(statically_known_true(a != b) for a, b in zip(before.shape, after.shape, strict=True)):
        raise ValueError(f"replacement {name}: computes {_describe(after)} where {old.name} is {_describe(before)}")
