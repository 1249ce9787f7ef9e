"""What operators make of fake tensors, looked up where a call like this one has been seen.

Shape, strides and dtype of a result depend on those of the arguments and on their constants, not on values. Where sizes
are symbols it takes torch milliseconds to work them out, and the second of 32 layers asks for the same as the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.sym_node import SymNode

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unlike(Exception):
    """A call whose result does not follow from its kind."""


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        kind: all that the metadata of its result depend on.
        tensors: among its arguments, in order.
        storages: theirs, by identity.
    """

    kind: Any
    tensors: list[FakeTensor]
    storages: list[int]


@dataclass
class Result:
    """What the calls of one kind make.

    Attributes:
        made: by the first of them.
        about: what its owner wants to know about it.
    """

    made: Any
    about: dict[str, Any] = field(default_factory=dict)
    _parts: dict[int, _Part] = field(default_factory=dict)

    def again(self, call: Call) -> Any:
        """What this call makes."""

        def again(part: Any) -> Any:
            return self._parts[id(part)].again(call) if isinstance(part, Tensor) else part

        if isinstance(self.made, (list, tuple)):
            return type(self.made)(map(again, self.made))
        return again(self.made)


@dataclass(frozen=True)
class _Part:
    """One tensor of a result: which of the call's tensors it is, or shares memory with (None: no one); and its shape,
    strides and offset, as a plain tensor on the meta device."""

    position: int | None
    base: int | None
    plain: Tensor
    device: torch.device

    @classmethod
    def of(cls, made: Any, call: Call) -> _Part:
        if type(made) is not FakeTensor or made.constant is not None or made.requires_grad:
            raise Unlike
        position = next((i for i, tensor in enumerate(call.tensors) if tensor is made), None)
        storage = made.untyped_storage()._cdata
        base = call.storages.index(storage) if storage in call.storages else None
        with _below(made):
            return cls(position, base, torch.ops.aten.detach.default(made), made.fake_device)

    def again(self, call: Call) -> FakeTensor:
        if self.position is not None:
            return call.tensors[self.position]
        first, plain = call.tensors[0], self.plain
        with _below(first):
            memory = torch.empty(0, dtype=plain.dtype, device="meta") if self.base is None else call.tensors[self.base]
            place = plain.shape, plain.stride(), plain.storage_offset()
            return FakeTensor(first.fake_mode, torch.ops.aten.as_strided.default(memory, *place), self.device)


@contextlib.contextmanager
def _below(tensor: FakeTensor) -> Iterator[None]:
    """Where fake tensors are the meta tensors that they are made of."""
    with no_python_dispatcher(), in_kernel_invocation_manager(tensor.fake_mode):
        yield


class Results:
    """The results of calls that were made."""

    def __init__(self) -> None:
        self._known: dict[Any, Result] = {}
        self._names = _Names()

    def call(self, func: Any, args: Any, kwargs: Any) -> Call:
        """Raises Unlike where two calls of this kind may have different results, and where no argument is a tensor."""
        known = isinstance(func, torch._ops.OpOverload) and func.namespace in ("aten", "burnish")
        if not known or func._schema.is_mutable or _DEPENDS_ON_DATA.intersection(func.tags):
            raise Unlike
        tensors: list[FakeTensor] = []
        kinds = self._kind(args, tensors), self._kind(kwargs, tensors)
        if not tensors or torch._C._is_any_autocast_enabled():
            raise Unlike
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        aliases = tuple(map(storages.index, storages))
        setting = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        return Call((func, kinds, aliases, tensors[0].fake_mode, setting), tensors, storages)

    def find(self, call: Call) -> Result | None:
        return self._known.get(call.kind)

    def keep(self, call: Call, made: Any, **about: Any) -> None:
        """Remembers what the call made: nothing, a tensor, or several."""
        parts = made if isinstance(made, (list, tuple)) else [made]
        with contextlib.suppress(Unlike):
            known = {id(part): _Part.of(part, call) for part in parts if part is not None}
            self._known[call.kind] = Result(made, about, known)

    def _kind(self, value: Any, tensors: list[FakeTensor]) -> Any:
        """What is known of a value, or of those in a list, tuple or dict, without the tensors' values. Collects
        these."""
        if type(value) is FakeTensor and value.constant is None:
            tensors.append(value)
            name = self._names.name
            sizes = (*map(name, value.shape), *map(name, value.stride()), name(value.storage_offset()))
            return sizes, value.dtype, value.device, value.requires_grad, torch._C._dispatch_keys(value).raw_repr()
        if isinstance(value, SymInt):
            return self._names.name(value)
        if isinstance(value, _CONSTANTS):
            return type(value), value
        if isinstance(value, (list, tuple)):
            return tuple(self._kind(each, tensors) for each in value)
        if isinstance(value, dict):
            return tuple((name, self._kind(each, tensors)) for name, each in value.items())
        raise Unlike


class _Names:
    """Names of sizes that stay while torch finds out that some are equal. It then writes one for the other, by rules of
    its own; here the one that was seen first stands for both."""

    def __init__(self) -> None:
        self._seen: dict[Any, None] = {}
        self._version: Any = None
        self._names: dict[Any, Any] = {}

    def name(self, size: int | SymInt) -> Any:
        if not isinstance(size, SymInt):
            return size
        if not isinstance(size.node, SymNode):  # of a nested tensor
            raise Unlike
        env, written = size.node.shape_env, size.node.expr
        assert env is not None
        if self._version != env._version_counter:  # something was found out
            self._version = env._version_counter
            self._names.clear()
        if written not in self._names:
            self._seen.update(dict.fromkeys(written.free_symbols))
            first: dict[Any, Any] = {}
            for symbol in self._seen:
                first.setdefault(env.replace(symbol), symbol)
            self._names[written] = written.xreplace(first)
        return self._names[written]


_current: ContextVar[Results | None] = ContextVar("results", default=None)


@contextlib.contextmanager
def results_remembered() -> Iterator[None]:
    """Within the `with`, `compute` remembers."""
    token = _current.set(_current.get() or Results())
    try:
        yield
    finally:
        _current.reset(token)


def compute(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`func(*args, **kwargs)`, for its metadata: within `results_remembered` perhaps as an earlier call had it."""
    results = _current.get()
    try:
        call = results.call(func, args, kwargs) if results is not None else None
    except Unlike:
        call = None
    if results is None or call is None:
        return func(*args, **kwargs)
    if (result := results.find(call)) is not None:
        return result.again(call)
    made = func(*args, **kwargs)
    results.keep(call, made)
    return made
