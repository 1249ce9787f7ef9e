"""`OptimizedModule`: the model's face with an entry for each input signature behind it.

The hot path is: flatten the call, look its signature up, read the weights where they live, run one generated function.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from burnish.graph.autocast import autocast_dtypes

MAX_ENTRIES = 512

_CONSTANTS = (type(None), bool, int, float, str)
_TENSORS = (Tensor, nn.Parameter)

_CONTAINERS = (tuple, list, dict)


class State:
    """An input that a call changes in place, registered as a pytree: a KV cache of `burnish.runtime.kv_cache`."""

    def new_tokens(self, call: Mapping[str, Any]) -> int:
        """How many tokens a call with these keywords adds. ValueError where they do not fit."""
        raise NotImplementedError

    def advance(self, tokens: int) -> None:
        """Counts them in, after the call."""
        raise NotImplementedError

    def put_into(self, result: Any) -> Any:
        """The call's result with this object in the place of the one that a graph made."""
        raise NotImplementedError


class Call(NamedTuple):
    """One call, normalized: positional arguments by name where forward has names for them, keywords sorted."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: pytree.TreeSpec | None

    def structure(self) -> pytree.TreeSpec:
        return self.spec if self.spec is not None else pytree.tree_structure((self.args, self.kwargs))


class Entry(Protocol):
    """What serves one signature. Returns `STALE` when the weights are not where they were."""

    def __call__(self, call: Call) -> Any: ...


class Resolver(Protocol):
    """Who makes entries, and knows what they are made by."""

    @property
    def schedule(self) -> Any: ...

    def entry(self, call: Call, differentiable: bool) -> tuple[Entry, Any]: ...

    def forget(self) -> None: ...


STALE = object()


class OptimizedModule(nn.Module):
    """The optimized model: same forward signature, same outputs, same parameters and buffers under the same names.

    It shares its weights with the model it was made from; attributes that it does not have itself are that model's
    (`fast.config`, `fast.generate`, ...).

    Attributes:
        serving: what makes and keeps what serves the calls.
    """

    def __init__(self, model: nn.Module, resolver: Resolver) -> None:
        super().__init__()
        self.__dict__["_original"] = model
        # The same dictionaries, so that names, state_dict, .to() and in-place updates are the model's own.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.__dict__["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        self.serving = resolver
        self._lock = threading.RLock()
        self._entries: dict[Any, Entry] = {}
        self._names = _positional_names(model)
        self.__dict__["_parameter_list"] = list(model.parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    @property
    def training(self) -> bool:
        """The model's own flag, so that it counts no matter on which of the two `train()` or `eval()` is called."""
        return bool(self.__dict__["_original"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_original" in self.__dict__:  # nn.Module's own constructor sets it too early
            self.__dict__["_original"].training = mode

    def train(self, mode: bool = True) -> OptimizedModule:
        self.__dict__["_original"].train(mode)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy (or what is unpickled) has a model of its own and is optimized anew at its first call."""
        return type(self), (self._original, self.serving)

    @property
    def schedule(self) -> Any:
        """The `burnish.Schedule` of what was done, step by step: to be inspected, undone in part, and continued."""
        return self.serving.schedule

    def forget(self) -> None:
        """Serves the next calls from scratch: captured, tuned and verified anew."""
        with self._lock:
            self._entries.clear()
            self.__dict__["_parameter_list"] = list(self._original.parameters())
            self.serving.forget()

    def report(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, before: Any = None) -> Any:
        """What was done: a `burnish.report.Report`, at once. With the inputs of a call, also what it costs: the model
        as it was and as it is now are measured on them, op by op, which takes some seconds.

        Args:
            before: the Report of `burnish.explain` on the same inputs. Without it the original is measured now: on
                weights that `optimize` may have laid out anew.
        """
        if isinstance(args, tuple) and not args and not kwargs:
            return self.serving.report()  # type: ignore[attr-defined]
        if self.serving.agreement.is_shared:  # type: ignore[attr-defined]
            raise ValueError(
                "args: a model that is divided among ranks is not timed op by op; report() says what was done"
            )
        from burnish.report.after import report_on

        return report_on(self, args, dict(kwargs or {}), before)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens after a prompt, by a Hugging Face model: see `burnish.runtime.generate.generate`."""
        from burnish.runtime.generate import generate

        if not hasattr(self._original, "generate"):
            raise AttributeError(f"generate: {type(self._original).__name__} is no Hugging Face model that generates")
        return generate(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = next((v for v in (*args, *kwargs.values()) if isinstance(v, State)), None)
        if state is None:
            return self._serve(args, kwargs)
        tokens = state.new_tokens(kwargs | dict(zip(self._names, args, strict=False)))
        result = self._serve(args, kwargs)
        state.advance(tokens)
        return state.put_into(result)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call(args, kwargs)
        if call is None:
            return self._original(*args, **kwargs)
        for _ in range(2):
            differentiable = torch.is_grad_enabled() and self._wants_gradients(call.leaves)
            key = self._key(call, differentiable)
            entry = self._entries.get(key) if key is not None else None
            if entry is None:
                if key is None:
                    return self._serve_nested(call, differentiable, args, kwargs)
                entry, result = self._make_entry(key, call, differentiable)
                if result is not STALE:
                    return result
            result = entry(call)
            if result is not STALE:
                return result
            self.forget()
        return self._original(
            *args, **kwargs
        )  # someone else keeps moving the weights: two optimized versions of one model, say

    def _serve_nested(self, call: Call, differentiable: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that has no signature: of nested tensors, or of what no graph can take."""
        nested = getattr(self.serving, "nested", None)
        if nested is not None and any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in call.leaves):
            with self._lock:
                result = nested(call, differentiable)
            if result is not STALE:
                return result
        return self._original(*args, **kwargs)

    def _make_entry(self, key: Any, call: Call, differentiable: bool) -> tuple[Entry, Any]:
        with self._lock:
            if key in self._entries:
                return self._entries[key], STALE
            entry, result = self.serving.entry(call, differentiable)
            while len(self._entries) >= MAX_ENTRIES:
                self._entries.pop(next(iter(self._entries)))
            self._entries[key] = entry
            return entry, result

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The normalized call, or None where the model itself has to say what is wrong with it (or is being traced)."""
        if torch.compiler.is_compiling():
            return None
        if args and self._names:
            named = dict(zip(self._names, args, strict=False))
            if len(args) > len(self._names) or not named.keys().isdisjoint(kwargs):
                return None
            named.update(kwargs)
            args, kwargs = (), named
        if len(kwargs) > 1:
            kwargs = dict(sorted(kwargs.items()))
        else:
            kwargs = dict(kwargs)
        leaves = [*args, *kwargs.values()]
        if all(type(leaf) in _TENSORS or type(leaf) in _CONSTANTS for leaf in leaves):
            return Call(args, kwargs, leaves, None)
        # Only plain containers are looked into: what another KV cache goes through in a call, no graph would do to it.
        leaves, spec = pytree.tree_flatten(
            (args, kwargs), is_leaf=lambda x: type(x) not in _CONTAINERS and not isinstance(x, State)
        )
        return Call(args, kwargs, leaves, spec)

    def _key(self, call: Call, differentiable: bool) -> Any:
        """The signature, or None for a call with something in it that no graph can take."""
        parts: list[Any] = [self.training, differentiable, len(call.args), call.spec or tuple(call.kwargs)]
        if torch._C._is_any_autocast_enabled():
            parts.append(autocast_dtypes())
        for leaf in call.leaves:
            if type(leaf) in _TENSORS:
                if leaf.layout is not torch.strided or leaf.is_nested:
                    return None
                stride = None if leaf.is_contiguous() else leaf.stride()
                parts.append(
                    (leaf.shape, leaf.dtype, leaf.device, stride, leaf.requires_grad if differentiable else False)
                )
            elif type(leaf) in _CONSTANTS:
                parts.append((type(leaf), leaf))
            else:
                return None
        if call.spec is not None:
            try:
                hash(call.spec)
            except TypeError:  # a pytree context may hold anything
                return None
        return tuple(parts)

    def _wants_gradients(self, leaves: Sequence[Any]) -> bool:
        return any(p.requires_grad for p in self._parameter_list) or any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves
        )


def _positional_names(model: nn.Module) -> tuple[str, ...]:
    """Names of forward's positional-or-keyword parameters; none of them if it also takes `*args`, or is a graph's: one
    that was exported takes its arguments only as it was exported with them."""
    if isinstance(model, fx.GraphModule):
        return ()
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def original_entry(model: Callable[..., Any]) -> Entry:
    """An entry that runs the model as it was."""
    return lambda call: model(*call.args, **call.kwargs)
