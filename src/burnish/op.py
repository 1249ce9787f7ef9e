"""Op, the registry, `use()` and `why_not()`.

An Op is a short plain-PyTorch *reference* and everything that hangs on it: what it costs, inputs to try it on, and the
implementations that compute the same thing faster. The reference is at once the specification, the fallback, the shape
function under fake tensors, the backward pass and the test oracle.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from burnish.arguments import computes_next, is_traced, is_transformed, signature_of
from burnish.autograd import Backward, Forward, by_passes, by_recomputing
from burnish.impl import Cost as Cost
from burnish.impl import Impl as Impl
from burnish.impl import ImplUnavailable as ImplUnavailable
from burnish.impl import Result as Result
from burnish.impl import Sample as Sample
from burnish.selection import choosing, chosen_impls, without_autocast

_NAMESPACE = "burnish"
_MOST_PREFERRED = 1024
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")

OPS: dict[str, Op] = {}
"""Every registered Op by name."""


class Op:
    """A fused operator. Calling it picks an Impl and runs it; see the module's docstring and the reference's.

    The call is differentiable and works in torch.compile, torch.export, under fake tensors and in fx tracing, where it
    is the one node `torch.ops.burnish.<name>`. It computes in the dtypes it is given: torch.autocast does not touch it.
    """

    def __init__(
        self,
        reference: Callable[..., Result],
        cost: Callable[..., Cost],
        samples: Callable[[torch.device, torch.dtype], Iterator[Sample]],
        check: Callable[..., None] | None = None,
        shape: Callable[..., Result] | None = None,
        donates: Mapping[str, int] | None = None,
        follows: str | None = None,
        widens: Sequence[str] = (),
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.signature = inspect.signature(reference)
        self._cost, self._samples, self._check = cost, samples, check or _nothing_to_check
        self.shape = shape or reference
        parameters = self.signature.parameters
        self._names = tuple(parameters)
        self._defaults = tuple(p.default for p in parameters.values())
        # Positions of the matrices that a model keeps, as the tuner wants to know them.
        self.weights = tuple(i for i, name in enumerate(self._names) if name.endswith("weight"))
        # By position the arguments whose memory an Impl's `in_place` reuses, each with its result's position.
        self.donates = {self._names.index(name): result for name, result in (donates or {}).items()}
        self._required = sum(default is inspect.Parameter.empty for default in self._defaults)
        self.follows = follows
        self.widens = tuple(self._names.index(name) for name in widens)  # positions of what is read in a wide dtype
        self.training: Callable[..., Result] | None = None  # where gradients are wanted; see `burnish.autograd`
        self._parts: Callable[..., Result] | None = None
        self._with_backward: dict[str, Callable[..., Result]] = {}
        self._nested: Callable[..., Result] | None = None  # for nested tensors
        # By Impl and signature: what runs, and whether it is checked each time, as on a CPU a check may read values.
        self._preferred: dict[Any, tuple[Callable[..., Result], bool]] = {}
        self.impls: dict[str, Impl] = {}
        self.impl("reference", differentiable=True)(reference)
        self._register()

    def __repr__(self) -> str:
        return f"<Op {self.name}{self.signature}: {', '.join(self.impls)}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        bound = self.bind(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.overload(*bound)
        if is_traced(bound):
            if any(isinstance(a, Tensor) and a.is_nested for a in bound):
                if self._nested is not None:
                    return self._nested(*bound)
                raise TypeError(f"{self.name} takes no nested tensors; pad them (attention takes a key_padding_mask)")
            return self.overload(*bound)
        self._check(*bound)
        with without_autocast(bound):
            if is_transformed():  # vmap, jvp and their like know the reference's operators
                return self.reference(*bound)
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in bound):
                return self._select_differentiable(bound)(*bound)
            return self.select(*bound).fn(*bound)

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """All arguments in the signature's order, with the defaults filled in. TypeError for a wrong call."""
        count = len(args)
        if not kwargs and self._required <= count <= len(self._names):
            return args + self._defaults[count:]
        rest = zip(self._names[count:], self._defaults[count:], strict=True)
        values = args + tuple(kwargs.pop(name, default) for name, default in rest)
        if kwargs or len(values) > len(self._names) or any(v is inspect.Parameter.empty for v in values):
            self._explain_wrong_call(args, values, kwargs)
        return values

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """Floating-point operations and bytes of one call. Reads only shapes and dtypes: fake and meta tensors do."""
        return self._cost(*self.bind(*args, **kwargs))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """ValueError or TypeError, naming the argument, for inputs that the Op does not take."""
        self._check(*self.bind(*args, **kwargs))

    def samples(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
        """Inputs that show every feature of the Op: random with outliers, of dtype `dtype`, always the same ones."""
        return self._samples(torch.device(device), dtype)

    def impl(
        self,
        name: str,
        why_not: Callable[..., list[str]] | None = None,
        differentiable: bool = False,
        configs: Callable[..., Sequence[Any]] | None = None,
        in_place: Callable[..., Result] | None = None,
        named_only: str = "",
        live_rows: bool = False,
    ) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
        """Register the decorated function as an Impl, preferred after those registered before it.

        `why_not` takes all arguments of the Op positionally and returns every reason against; without it the Impl takes
        everything. `configs` takes the same arguments. `in_place` is the Impl without copies of what the Op donates.
        With `named_only`, a reason, it is never chosen but by name. `live_rows`: see `Impl`.
        ValueError for a name that is taken, and for an `in_place` where the Op donates nothing.
        """
        if name in self.impls:
            raise ValueError(f"{self.name} has an Impl {name!r} already; choose another name")
        if in_place is not None and not self.donates:
            raise ValueError(f"{self.name} donates no argument that the Impl {name!r} could write into in place")

        def register(fn: Callable[..., Result]) -> Callable[..., Result]:
            description = (inspect.getdoc(fn) or "").split("\n")[0]
            reasons = why_not or _always_available
            how = (configs, in_place, named_only, live_rows)
            impl = Impl(name, fn, differentiable, description, reasons, self.bind, *how)
            reference = self.impls.pop("reference", None)
            self.impls[name] = impl
            if reference is not None:  # the fallback stays last
                self.impls["reference"] = reference
            return fn

        return register

    def select(self, *args: Any, **kwargs: Any) -> Impl:
        """The Impl for these inputs: the one that `use()` names, else the first that has nothing against them.

        ImplUnavailable where `use()` names one that cannot take them: an explicit choice never falls back.
        """
        args = self.bind(*args, **kwargs)
        explicit = self._explicit(args)
        if explicit is not None:
            return explicit
        for impl in self.impls.values():
            if not impl.named_only and not impl.reasons(*args):
                return impl
        raise AssertionError(f"{self.name}: the reference takes everything")  # it has no why_not

    def _run_preferring(self, impl: str, args: tuple[Any, ...]) -> Result:
        """The result for bound arguments by the Impl "name" or "name config", or, where it cannot take these, by the
        one that `select` gives. `use()` goes before.

        A graph calls this with arguments of the same few signatures, for which there is nothing to find out again.
        """
        key = impl, *signature_of(args)
        known = None if chosen_impls() else self._preferred.get(key)
        if known is None or known[1]:
            self._check(*args)
        with without_autocast(args):
            fn = self._preferring(impl, args, key) if known is None else known[0]
            return fn(*args)

    def _preferring(self, impl: str, args: tuple[Any, ...], key: Any) -> Callable[..., Result]:
        name, _, config = impl.partition(" ")
        found = find_impl(self, name)
        if found.reasons(*args) or self._explicit(args) is not None:
            return self.select(*args).fn
        # Without the keyword it is the first one, which `fn` would look for in each call (35 us for attention).
        configs = found.configs(*args) if found.configs is not None else ()
        given = next((c for c in configs if str(c) == config), configs[0] if configs else None)
        fn = found.fn if given is None else functools.partial(found.fn, config=given)
        if len(self._preferred) >= _MOST_PREFERRED:
            self._preferred.clear()
        self._preferred[key] = fn, any(isinstance(a, Tensor) and not a.is_cuda for a in args)
        return fn

    def differentiate(
        self, forward: Forward, backward: Backward, on_cpu: str | None = None, in_graphs: bool = True
    ) -> None:
        """Give the Op a forward pass for training and a backward pass; see `burnish.autograd`.

        Both are made of Ops and PyTorch's operators, so that who traces them sees those. `on_cpu` names a
        differentiable Impl to take on the CPU instead, wherever it takes the inputs; without `in_graphs` not where a
        graph is recorded, in which Python costs nothing.
        """
        passes = by_passes(self.name, forward, backward, self.reference)
        if on_cpu is None:
            self.training = passes
            return
        impl = self.impls[on_cpu]

        def training(*args: Any) -> Result:
            first = next(a for a in args if isinstance(a, Tensor))
            on_cpu = first.device.type == "cpu" and (in_graphs or not is_traced(args))
            takes = on_cpu and self.name not in chosen_impls() and not impl.reasons(*args)
            return impl.fn(*args) if takes else passes(*args)

        self.training = training

    def compose(self, parts: Callable[..., Result]) -> None:
        """Have the Op differentiated as `parts`, which takes its arguments and gives its result by smaller Ops."""
        self.training = self._parts = parts

    def for_nested(self, function: Callable[..., Result]) -> None:
        """Have calls with nested tensors computed by `function`, which takes all arguments positionally and checks
        them."""
        self._nested = function

    def with_backward(self, impl: Impl | str) -> Callable[..., Result]:
        """The Impl as a differentiable callable: `impl.fn` itself where it is, else with the Op's backward pass."""
        impl = self.impls[impl] if isinstance(impl, str) else impl
        if impl.differentiable:
            return impl.fn
        if impl.name not in self._with_backward:
            self._with_backward[impl.name] = self._add_backward(impl)
        return self._with_backward[impl.name]

    def _add_backward(self, impl: Impl) -> Callable[..., Result]:
        training = self.training
        if training is None or self._parts is not None:
            return by_recomputing(impl.fn, self._parts or self.reference)

        def run(*args: Any) -> Result:
            with choosing({**chosen_impls(), self.name: impl.name}):
                return training(*args)

        return run

    def _explain_wrong_call(self, args: tuple[Any, ...], values: tuple[Any, ...], unused: dict[str, Any]) -> NoReturn:
        if len(args) > len(self._names):
            fault = f"{len(args)} arguments where it has {len(self._names)}"
        elif unused:
            name = next(iter(unused))
            fault = f"{name!r} is given twice" if name in self._names else f"it has no argument {name!r}"
        else:
            missing = [n for n, v in zip(self._names, values, strict=True) if v is inspect.Parameter.empty]
            fault = f"missing {', '.join(missing)}"
        raise TypeError(f"{self.name}: {fault}; it takes ({', '.join(self._names)})")

    def asked_for(self, impls: Mapping[str, str]) -> str | None:
        """The Impl that these choices, Impl names by Op name, want for this Op: under its own name, or that of the Op
        of which it is a part. ImplUnavailable where it has none of that name."""
        name, follows = impls.get(self.name), self.follows
        while name is None and follows is not None:
            name = impls.get(follows)
            if name is not None and name not in self.impls:
                reason = f"{self.name} has no such Impl; it has {', '.join(self.impls)}"
                raise ImplUnavailable(follows, name, [reason])
            follows = OPS[follows].follows
        return name

    def _explicit(self, args: tuple[Any, ...]) -> Impl | None:
        chosen = chosen_impls()
        name = self.asked_for(chosen) if chosen else None
        if name is None:
            return None
        impl = self.impls[name]
        if reasons := impl.reasons(*args):
            raise ImplUnavailable(self.name, name, reasons)
        return impl

    def _select_differentiable(self, args: tuple[Any, ...]) -> Callable[..., Result]:
        explicit = self._explicit(args)
        if explicit is not None:
            return self.with_backward(explicit)
        if self.training is not None:
            return self.training
        # An Impl with its own backward comes first: the reference's backward would run the reference's forward again.
        return next(i.fn for i in self.impls.values() if i.differentiable and not i.reasons(*args))

    def _register(self) -> None:
        schema = torch.library.infer_schema(self.reference, mutates_args=())
        arguments, _, returns = schema.rpartition(") -> ")
        _LIBRARY.define(f"{self.name}{arguments}, *, str impl='') -> {returns}")
        qualified = f"{_NAMESPACE}::{self.name}"

        def eager(*args: Any, impl: str = "") -> Result:
            args = self.bind(*args)  # the dispatcher drops trailing arguments that equal their defaults
            if impl:
                return self._run_preferring(impl, args)
            self._check(*args)
            with without_autocast(args):
                return self.select(*args).fn(*args)

        def fake(*args: Any, impl: str = "") -> Result:
            args = self.bind(*args)
            self._check(*args)
            with without_autocast(args):
                return self.shape(*args)

        def differentiable(keyset: Any, *args: Any, impl: str = "") -> Result:
            def below(*args: Any) -> Result:
                with torch._C._AutoDispatchBelowAutograd():
                    if computes_next(keyset.raw_repr()):  # through the dispatcher it is 5 us more, of 9
                        return eager(*args, impl=impl)
                    return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, impl=impl)

            if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
                return below(*args)
            args = self.bind(*args)
            asked_for = self._explicit(args) if chosen_impls() and not is_traced(args) else None
            if self.training is None or (self._parts is not None and impl):
                run = by_recomputing(below, self._parts or self.reference)
            else:
                run = self.training
            with without_autocast(args):
                return (run if asked_for is None else self.with_backward(asked_for))(*args)

        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, eager, key)
        _LIBRARY.impl(self.name, differentiable, "Autograd", with_keyset=True)
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        self.overload: torch._ops.OpOverload = getattr(torch.ops.burnish, self.name).default


def op(
    *,
    cost: Callable[..., Cost],
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]],
    check: Callable[..., None] | None = None,
    shape: Callable[..., Result] | None = None,
    donates: Mapping[str, int] | None = None,
    follows: str | None = None,
    widens: Sequence[str] = (),
) -> Callable[[Callable[..., Result]], Op]:
    """Turn the decorated reference into an Op of the same name and register it. ValueError for a name that is taken.

    `cost` and `check` take all arguments positionally; `check` raises ValueError or TypeError on bad ones, naming them.
    `shape` gives empty results like the reference's, where running that on symbolic sizes takes long (attention's 90
    ms, in each layer of a model). `donates` names arguments of which a result is a changed copy, each with that
    result's position: who has no further use for such an argument may have it changed in place (`Impl.in_place`); the
    Op itself writes to none. `follows` names an Op of which this one is a part in training: `use()` of an Impl of that
    one, or of one that it follows, chooses this one's of the same name. `widens` names arguments of which a wider copy
    would change nothing. The reference is fully annotated; it returns fresh memory, contiguous unless its docstring
    says otherwise.
    """

    def register(reference: Callable[..., Result]) -> Op:
        name = reference.__name__
        if name in OPS:
            raise ValueError(f"an Op named {name!r} is registered already; choose another name")
        OPS[name] = Op(reference, cost, samples, check, shape, donates, follows, widens)
        return OPS[name]

    return register


@contextmanager
def use(**impls: str) -> Iterator[None]:
    """Within the `with`, run these Ops by these Impls: `use(attention="torch_flash")`. Nests; local to thread and task.

    A call that the Impl cannot take raises ImplUnavailable with every reason. ValueError at entry for an unknown name.
    """
    for op_name, impl_name in impls.items():
        find_impl(op_name, impl_name)
    with choosing({**chosen_impls(), **impls}):
        yield


def why_not(op: str | Op, impl: str, *args: Any, **kwargs: Any) -> list[str]:
    """Every reason why the Impl cannot take these inputs; empty when it can. ValueError for an unknown name."""
    return find_impl(op, impl).why_not(*args, **kwargs)


def find_op(name: str) -> Op:
    """The Op of that name; ValueError that lists the Ops there are."""
    importlib.import_module("burnish.ops")
    if name not in OPS:
        raise ValueError(f"there is no Op {name!r}; there are: {', '.join(sorted(OPS))}")
    return OPS[name]


def find_impl(op: str | Op, name: str) -> Impl:
    """The Op's Impl of that name; ValueError that lists the Impls there are, TypeError for what is no name."""
    op = find_op(op) if isinstance(op, str) else op
    if not isinstance(name, str):
        raise TypeError(f"impl is a {type(name).__name__}; it must be the name of an Impl of {op.name}")
    if name not in op.impls:
        raise ValueError(f"{op.name} has no Impl {name!r}; it has: {', '.join(op.impls)}")
    return op.impls[name]


def _always_available(*args: Any) -> list[str]:
    return []


def _nothing_to_check(*args: Any) -> None:
    return None
