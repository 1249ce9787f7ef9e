"""What decides a capture, as one hash: the model's structure, settings and source, the inputs' structure, and versions.

Weights' values are no part of it: a graph names its weights. What cannot be read off (a closure, an object of unknown
kind, a class made in an interactive session) makes a capture unrepeatable: it has no key, and a reason.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from burnish.capture import given_to_export
from burnish.graph.autocast import autocast_dtypes
from burnish.runtime.module import Call

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_TORCH_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload)
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
# Attributes of every nn.Module that are told otherwise, or that no forward reads.
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}


class NoKey(Exception):
    """Why this capture cannot be told from others (one line)."""


@dataclass(frozen=True)
class Key:
    """Attributes:
    digest: equal for calls that `capture` makes the same of, in any process.
    tensors: addresses of tensors that were seen outside parameters and buffers.
    """

    digest: str
    tensors: frozenset[int]


def key_of(model: nn.Module, call: Call) -> Key:
    """The key of capturing `model` for `call`. NoKey: there is none, with the reason."""
    reader = _Reader()
    for name in _GLOBAL_HOOKS:
        if getattr(torch_module, name, None):
            raise NoKey("a hook for all modules is registered")
    reader.tell("environment", *_environment())
    reader.inputs(call)
    reader.module(model, "the model")
    return Key(reader.digest(), frozenset(reader.tensors))


def _environment() -> Iterable[str]:
    versions = [platform.python_version(), torch.__version__, _version("transformers"), _own_source()]
    return (*versions, str(torch.get_default_dtype()), str(torch.get_default_device()), str(autocast_dtypes()))


class _Reader:
    """Walks through a model and puts what it sees into one hash."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.tensors: set[int] = set()
        self._numbers: dict[int, int] = {}  # of modules and weights, whose identity counts
        self._digests: dict[int, str | None] = {}  # of other values, whose identity does not; None: not done yet
        self._code: dict[str, str] = {}  # digests of classes and source files by name
        self._classes: set[type] = set()
        self._roots: set[str] = set()
        self._kept: list[Any] = []  # what was seen, so that nothing else gets its id

    def tell(self, *parts: Any) -> None:
        self.hash.update("\0".join([*map(str, parts), "\n"]).encode("utf-8", "surrogatepass"))

    def digest(self) -> str:
        self.tell("code", *sorted(self._code.items()))
        return self.hash.hexdigest()

    def _known(self, value: Any) -> bool:
        """Whether this very module or weight was seen before; what is told then is which one it was."""
        if id(value) in self._numbers:
            self.tell("again", self._numbers[id(value)])
            return True
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return False

    def _apart(self, read: Callable[..., None], *args: Any) -> str:
        """The digest of what `read` tells."""
        outer, self.hash = self.hash, hashlib.sha256()
        try:
            read(*args)
            return self.hash.hexdigest()
        finally:
            self.hash = outer

    # --- the call ---------------------------------------------------------------------------------

    def inputs(self, call: Call) -> None:
        """Dtypes, ranks and constants; of sizes only which are 1 and which are equal, as export sees them: it gives a
        size of 1 no symbol, and a capture may ask whether two sizes are equal."""
        try:
            self.tell("inputs", pytree.treespec_dumps(call.structure()))
        except Exception as error:
            raise NoKey(f"inputs of a structure that cannot be written: {error}") from error
        labels: dict[int, int] = {1: 1}
        for leaf in given_to_export(call.leaves):
            if type(leaf) in (Tensor, nn.Parameter):
                sizes = [labels.setdefault(size, len(labels) + 1) for size in leaf.shape]
                order = "" if leaf.is_contiguous() else sorted(range(leaf.dim()), key=leaf.stride)
                self.tell(type(leaf).__name__, leaf.dtype, leaf.device, leaf.layout, leaf.requires_grad, sizes, order)
            elif type(leaf) in _SCALARS:
                self.tell(type(leaf).__name__, repr(leaf))
            else:
                raise NoKey(f"an input is a {type(leaf).__name__}")

    # --- the model --------------------------------------------------------------------------------

    def module(self, module: nn.Module, where: str) -> None:
        if self._known(module):
            return
        self.cls(type(module), where)
        for name in _HOOKS:
            if getattr(module, name, None):
                raise NoKey(f"{where} has a hook")
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                self.tell(kind, name, name in module._non_persistent_buffers_set)
                if tensor is not None:
                    self.weight(tensor, f"{where}.{name}")
        for name, value in sorted(vars(module).items()):
            if name not in _MACHINERY:
                self.tell("attribute", name)
                self.value(value, f"{where}.{name}")
        for name, child in module._modules.items():
            self.tell("child", name)
            if child is not None:
                self.module(child, f"{where}.{name}")
        self.tell("end")

    def weight(self, tensor: Tensor, where: str) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise NoKey(f"{where} is a {type(tensor).__name__}")
        if self._known(tensor):  # which weights are tied
            return
        described = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device, tensor.requires_grad)
        self.tell("tensor", type(tensor).__name__, *described)

    def value(self, value: Any, where: str) -> None:
        kind = type(value)
        if kind in _SCALARS or isinstance(value, (*_TORCH_CONSTANTS, range, pathlib.PurePath)):
            self.tell(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self.tell("enum", kind.__qualname__, value.name)
            self.cls(kind, where)
        elif isinstance(value, type):
            self.cls(value, where)
        elif isinstance(value, nn.Module):
            self.module(value, where)
        elif isinstance(value, Tensor):
            self.tensors.add(value.untyped_storage().data_ptr())
            self.weight(value, where)
        else:
            if id(value) not in self._digests:
                self._digests[id(value)] = None
                self._kept.append(value)
                self._digests[id(value)] = self._apart(self._composite, value, where)
            self.tell(self._digests[id(value)])

    def _composite(self, value: Any, where: str) -> None:
        kind = type(value)
        if isinstance(value, (list, tuple, Mapping, set, frozenset)):
            self._container(value, where)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial, *_BUILTINS)):
            self._callable(value, where)
        elif isinstance(value, types.ModuleType):
            self.tell("module", value.__name__)
            self.source(value.__name__, where)
        elif is_dataclass(kind) or callable(getattr(kind, "to_dict", None)):
            self.cls(kind, where)
            self._attributes(value, where)
        else:
            raise NoKey(f"{where} is a {kind.__module__}.{kind.__qualname__}")

    def _container(self, value: Any, where: str) -> None:
        self.tell("container", type(value).__qualname__, len(value))
        if not type(value).__module__.startswith(("builtins", "collections", "torch")):
            self.cls(type(value), where)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.value(key, f"a key of {where}")
                self.value(item, f"{where}[{key!r}]")
        elif isinstance(value, (set, frozenset)):
            if not all(type(item) in _SCALARS for item in value):
                raise NoKey(f"{where} is a set of objects")
            self.tell(*sorted(map(repr, value)))
        else:
            for position, item in enumerate(value):
                self.value(item, f"{where}[{position}]")
        if hasattr(value, "__dict__"):
            self._attributes(value, where)

    def _attributes(self, value: Any, where: str) -> None:
        if not hasattr(value, "__dict__"):
            raise NoKey(f"{where} is a {type(value).__qualname__} without attributes that can be read")
        for name, item in sorted(vars(value).items()):
            self.tell("attribute", name)
            self.value(item, f"{where}.{name}")

    def _callable(self, value: Any, where: str) -> None:
        self.tell(type(value).__name__)
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, where)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, where)
            self.value(value.__self__, where)
        elif isinstance(value, types.FunctionType):
            if value.__closure__ or value.__name__ == "<lambda>":
                raise NoKey(f"{where} is a {'closure' if value.__closure__ else 'lambda'}")
            self.tell(*_code(value))
            self.source(value.__module__, where)
        else:
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, (types.ModuleType, type)):
                raise NoKey(f"{where} is a method of a {type(owner).__name__}")
            self.tell(getattr(value, "__module__", ""), value.__qualname__)

    # --- source -----------------------------------------------------------------------------------

    def cls(self, cls: type, where: str) -> None:
        """The class by name and source; and its functions one by one, because they may have been exchanged at run
        time."""
        name = f"{cls.__module__}.{cls.__qualname__}"
        self.tell("class", name)
        if cls not in self._classes:
            self._classes.add(cls)
            self._code[f"class {name}"] = self._apart(self._class, cls, where)

    def _class(self, cls: type, where: str) -> None:
        for base in cls.__mro__:
            package = base.__module__.partition(".")[0]
            if package == "torch":  # its version says what is in it, unless somebody exchanged it (others add to it)
                for name in ("forward", "__call__"):
                    function = _function_of(vars(base).get(name))
                    if function is not None and (function.__module__ or "").partition(".")[0] != "torch":
                        self.tell(name, *_code(function))
            if package in ("torch", "builtins", "abc", "typing", "collections", "enum"):
                continue
            found: Any = sys.modules.get(base.__module__)
            for part in base.__qualname__.split("."):
                found = getattr(found, part, None)
            if found is not base:
                raise NoKey(f"{where} is of {base.__module__}.{base.__qualname__}, a class made at run time")
            self.tell("base", base.__module__, base.__qualname__)
            self.source(base.__module__, where)
            for name, value in sorted(vars(base).items()):
                function = _function_of(value)
                if function is not None:
                    self.tell(name, *_code(function))
                elif type(value) in _SCALARS and not name.startswith("_"):  # those are caches that fill, as a rule
                    self.tell(name, repr(value))

    def source(self, name: str, where: str) -> None:
        """The module in which something is defined: its file, and what its globals are. Of installed packages the
        version says the rest; of the user's own code all that it reaches is read."""
        if f"source {name}" in self._code or name.partition(".")[0] in ("torch", "burnish", "builtins"):
            return
        self._code[f"source {name}"] = ""
        self._code[f"source {name}"] = self._apart(self._source, name, where)

    def _source(self, name: str, where: str) -> None:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None or not Path(file).is_file():
            raise NoKey(f"{where} is defined in {name}, which has no file")
        kind = _kind_of(file)
        if kind == "standard library":
            return
        self.tell(_hash_of(file))
        if kind == "installed":
            self.tell("version", _version(name.partition(".")[0]))
        else:
            self._neighbours(name, file, where)
        for global_name, value in sorted(vars(module).items()):
            if isinstance(value, Tensor):
                self.tensors.add(value.untyped_storage().data_ptr())
            function, owner = _function_of(value), getattr(value, "__module__", None)
            if function is not None:
                self.tell(global_name, *_code(function))
                owner = function.__module__
            elif isinstance(value, types.ModuleType):
                owner = value.__name__
            elif isinstance(value, type):
                self.tell(global_name, value.__module__, value.__qualname__)
            else:
                continue
            self._reached(owner, kind, where)

    def _neighbours(self, name: str, file: str, where: str) -> None:
        """The loaded modules of the same package, or of the same folder where there is no package."""
        top = sys.modules.get(name.partition(".")[0])
        root = os.path.dirname(os.path.abspath(getattr(top, "__file__", None) or file)) + os.sep
        if root in self._roots:
            return
        self._roots.add(root)
        for other, module in sorted(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if isinstance(path, str) and os.path.abspath(path).startswith(root) and _kind_of(path) == "own":
                self.source(other, where)

    def _reached(self, name: Any, by: str, where: str) -> None:
        """What a module's globals come from: read, where the user wrote it; else its version."""
        file = getattr(sys.modules.get(name), "__file__", None) if isinstance(name, str) else None
        if file is None or name.partition(".")[0] in ("torch", "burnish"):
            return
        kind = _kind_of(file)
        if kind == "own":
            self.source(name, where)
        elif kind == "installed" and by == "own":
            self._code[f"version {name}"] = _version(name.partition(".")[0])


def _function_of(value: Any) -> types.FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, types.FunctionType) else None


def _code(function: types.FunctionType) -> tuple[Any, ...]:
    """Which code a name stands for at the moment, decorated or not."""
    parts: list[Any] = []
    unwrapped: Any = function
    while isinstance(unwrapped, types.FunctionType):
        code = unwrapped.__code__
        parts += [unwrapped.__module__, unwrapped.__qualname__, code.co_firstlineno, code.co_code.hex(), code.co_names]
        parts += [repr(constant) for constant in code.co_consts if type(constant) in _SCALARS]
        unwrapped = getattr(unwrapped, "__wrapped__", None)
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def _kind_of(file: str) -> str:
    """Whether a source file is "installed", of the "standard library", or the user's "own"."""
    path = str(Path(file).resolve())
    paths = sysconfig.get_paths()
    if any(_is_under(path, paths[name]) for name in ("purelib", "platlib")) or "/site-packages/" in path.replace(
        "\\", "/"
    ):
        return "installed"
    return "standard library" if any(_is_under(path, paths[name]) for name in ("stdlib", "platstdlib")) else "own"


def _is_under(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(Path(folder).resolve())


@functools.lru_cache(maxsize=4096)
def _hash_of(file: str) -> str:
    """Of the file as it was when first asked, which is nearest to what was loaded from it."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.lru_cache(maxsize=1)
def _own_source() -> str:
    """A hash of Burnish itself."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(
        "".join(f"{file.relative_to(folder)} {_hash_of(str(file))}" for file in files).encode()
    ).hexdigest()


@functools.lru_cache(maxsize=256)
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
