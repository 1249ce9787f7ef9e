"""Op, Impl, use() and why_not(): choosing, refusing, and being one node wherever a graph is made."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from burnish.autograd import Saved
from burnish.op import OPS, Cost, ImplUnavailable, Op, Sample, find_impl, find_op, op, use, why_not
from burnish.tuning import Tuner

_numbers = itertools.count()


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    yield Sample("three", (torch.ones(3, device=device, dtype=dtype),))


def _check(x: Tensor, shift: Tensor | None, factor: float, label: str) -> None:
    if x.dim() != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have one dimension")


def _why_not(x: Tensor, shift: Tensor | None, factor: float, label: str) -> list[str]:
    reasons = [] if x.dtype == torch.float32 else [f"x is {x.dtype}"]
    return reasons if x.shape[0] > 2 else [*reasons, "x has fewer than three entries"]


class Toy:
    """`x * factor + shift, x + 1` as an Op, and what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        toy = self

        def reference(
            x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none"
        ) -> tuple[Tensor, Tensor]:
            """Doubles."""
            toy.ran.append("reference")
            return x * factor + (0 if shift is None else shift), x + 1

        reference.__name__ = f"toy_{next(_numbers)}"
        self.op = op(cost=lambda x, *_: Cost(x.numel(), 8 * x.numel()), samples=_samples, check=_check)(reference)

        @self.op.impl("fast", why_not=_why_not)
        def fast(
            x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none"
        ) -> tuple[Tensor, Tensor]:
            """Quick.

            More words.
            """
            toy.ran.append("fast")
            out = x.detach() * factor
            return (out if shift is None else out.add_(shift.detach())), x.detach() + 1


@pytest.fixture
def toy() -> Iterator[Toy]:
    toy = Toy()
    yield toy
    del OPS[toy.op.name]


def test_the_registry_knows_the_op_and_its_text(toy: Toy) -> None:
    assert OPS[toy.op.name] is toy.op is find_op(toy.op.name)
    assert toy.op.__doc__ == "Doubles."
    assert list(inspect.signature(toy.op).parameters) == ["x", "shift", "factor", "label"]
    assert toy.op.impls["fast"].description == "Quick."
    assert list(toy.op.impls) == ["fast", "reference"]
    assert toy.op.name in repr(toy.op)


def test_a_taken_name_is_refused(toy: Toy) -> None:
    def reference(x: Tensor) -> Tensor:
        return x + 1

    reference.__name__ = toy.op.name
    with pytest.raises(ValueError, match="registered already"):
        op(cost=lambda x: Cost(1, 1), samples=_samples)(reference)
    assert OPS[toy.op.name] is toy.op
    with pytest.raises(ValueError, match="has an Impl 'fast' already"):
        toy.op.impl("fast")


def test_bind_fills_the_defaults(toy: Toy) -> None:
    x = torch.ones(3)
    assert toy.op.bind(x) == (x, None, 2.0, "none")
    assert toy.op.bind(x, label="a", factor=3.0) == (x, None, 3.0, "a")
    assert toy.op.bind(label="a", x=x) == (x, None, 2.0, "a")


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "missing x"),
        ((1, 2, 3, 4, 5), {}, "5 arguments where it has 4"),
        ((1,), {"nonsense": 2}, "it has no argument 'nonsense'"),
        ((1,), {"x": 2}, "'x' is given twice"),
        ((), {"label": "a"}, "missing x"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(toy: Toy, args: tuple[int, ...], kwargs: dict[str, int], says: str) -> None:
    with pytest.raises(TypeError, match=f"{toy.op.name}: {says}; it takes \\(x, shift, factor, label\\)"):
        toy.op(*args, **kwargs)


def test_the_first_impl_without_reasons_runs(toy: Toy) -> None:
    toy.op(torch.ones(3))
    toy.op(torch.ones(2))
    toy.op(torch.ones(3).double())
    assert toy.ran == ["fast", "reference", "reference"]
    assert toy.op.select(torch.ones(3)).name == "fast"
    assert toy.op.select(x=torch.ones(2)).name == "reference"


def test_an_impl_that_is_only_taken_by_name(toy: Toy) -> None:
    @toy.op.impl("odd", named_only="it is odd")
    def odd(x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none") -> tuple[Tensor, Tensor]:
        toy.ran.append("odd")
        return x * factor, x + 1

    toy.op(torch.ones(2))
    with use(**{toy.op.name: "odd"}):
        toy.op(torch.ones(2))
    assert toy.ran == ["reference", "odd"]
    assert why_not(toy.op, "odd", torch.ones(2)) == []
    choice = Tuner("off").choose(toy.op, toy.op.bind(torch.ones(2)), budget_us=0)[1]
    assert (choice.impl, choice.rejected["odd"]) == ("reference", ["it is odd"])
    assert Tuner("off", {toy.op.name: "odd"}).choose(toy.op, toy.op.bind(torch.ones(2)), budget_us=0)[1].impl == "odd"


def test_why_not_gives_every_reason(toy: Toy) -> None:
    both = ["x is torch.float64", "x has fewer than three entries"]
    assert why_not(toy.op, "fast", torch.ones(2).double()) == both
    assert why_not(toy.op.name, "fast", x=torch.ones(2).double(), label="a") == both
    assert why_not(toy.op, "fast", torch.ones(3)) == []
    assert why_not(toy.op, "reference", torch.ones(2)) == []


def test_an_explicit_choice_never_falls_back(toy: Toy) -> None:
    with use(**{toy.op.name: "fast"}), pytest.raises(ImplUnavailable) as caught:
        toy.op(torch.ones(2).double())
    assert caught.value.reasons == ["x is torch.float64", "x has fewer than three entries"]
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert toy.ran == []


def test_use_nests_and_ends(toy: Toy) -> None:
    x = torch.ones(3)
    with use(**{toy.op.name: "reference"}):
        toy.op(x)
        with use(**{toy.op.name: "fast"}):
            toy.op(x)
        with pytest.raises(ZeroDivisionError), use(**{toy.op.name: "fast"}):
            raise ZeroDivisionError
        toy.op(x)
    toy.op(x)
    assert toy.ran == ["reference", "fast", "reference", "fast"]


def test_use_is_local_to_the_thread(toy: Toy) -> None:
    with use(**{toy.op.name: "reference"}):
        thread = threading.Thread(target=toy.op, args=(torch.ones(3),))
        thread.start()
        thread.join()
    assert toy.ran == ["fast"]


def test_unknown_names_are_refused_at_entry_with_those_there_are(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"there is no Op 'linaer'; there are: .*linear"), use(linaer="torch"):
        pass
    with pytest.raises(ValueError, match="has no Impl 'triton'; it has: fast, reference"):
        find_impl(toy.op, "triton")
    with pytest.raises(ValueError, match="has no Impl"):
        why_not(toy.op, "triton", torch.ones(3))
    with pytest.raises(TypeError, match=r"^impl is a Tensor; it must be the name of an Impl of "):
        why_not(toy.op, torch.ones(3))  # type: ignore[arg-type]


def test_bad_input_is_refused_before_anything_runs(toy: Toy) -> None:
    with pytest.raises(ValueError, match="it must have one dimension"):
        toy.op(torch.ones(2, 2))
    with pytest.raises(ValueError, match="it must have one dimension"):
        toy.op.overload(torch.ones(2, 2))
    assert toy.ran == []


def test_nested_tensors_are_refused_by_name(toy: Toy) -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=f"{toy.op.name} takes no nested tensors; pad them"):
        toy.op(jagged)


def test_the_overload_chooses_at_run_time(toy: Toy) -> None:
    toy.op.overload(torch.ones(3), label="a")
    with use(**{toy.op.name: "reference"}):
        toy.op.overload(torch.ones(3))
    assert toy.ran == ["fast", "reference"]


def test_fx_sees_one_node(toy: Toy) -> None:
    graph = fx.symbolic_trace(lambda x, y: toy.op(x, shift=y)[0]).graph
    (node,) = [n for n in graph.nodes if n.target is toy.op.overload]
    assert [str(a) for a in node.args] == ["x", "y", "2.0", "none"]
    assert toy.ran == []


def test_fake_tensors_run_the_reference_only(toy: Toy) -> None:
    with FakeTensorMode() as mode:
        first, second = toy.op(mode.from_tensor(torch.ones(3)))
    assert first.shape == second.shape == (3,)
    assert set(toy.ran) == {"reference"}


def test_an_active_mode_sees_one_operator(toy: Toy) -> None:
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Listen():
        toy.op(x)
    assert seen == [toy.op.overload]


def test_autocast_does_not_touch_an_op(toy: Toy) -> None:
    linear = find_op("linear")
    x, w = torch.randn(4, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ w.T).dtype == torch.bfloat16
        results = [linear(x, w), linear.overload(x, w), linear(x.requires_grad_(), w)]
    assert [r.dtype for r in results] == [torch.float32] * 3


def test_gradients_come_from_a_differentiable_impl_or_the_reference(toy: Toy) -> None:
    x, shift = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    toy.op(x, shift)[0].sum().backward()
    assert toy.ran == ["reference"]
    toy.ran.clear()
    x.grad = shift.grad = None
    with use(**{toy.op.name: "fast"}):
        toy.op(x, shift)[0].sum().backward()
    assert toy.ran == ["fast", "reference"]  # the Impl forwards, the reference's backward
    assert x.grad is not None
    assert shift.grad is not None
    assert x.grad.tolist() == [2.0] * 3
    assert shift.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("way", ["with_backward", "overload"])
def test_gradients_of_gradients(toy: Toy, way: str) -> None:
    run = toy.op.overload if way == "overload" else toy.op.with_backward("fast")
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def fn(x: Tensor, shift: Tensor) -> Tensor:
        first, second = run(x * x, shift * x, 3.0, "none")
        return first * second

    assert torch.autograd.gradcheck(fn, (x, shift))
    assert torch.autograd.gradgradcheck(fn, (x, shift))


def test_a_differentiable_impl_is_used_as_it_is() -> None:
    attention = find_op("attention")
    assert attention.with_backward("torch_sdpa") is attention.impls["torch_sdpa"].fn
    assert attention.with_backward("torch_flash") is attention.with_backward(attention.impls["torch_flash"])
    assert attention.with_backward("torch_flash") is not attention.impls["torch_flash"].fn


def test_function_transforms_go_through_the_reference(toy: Toy) -> None:
    x = torch.randn(5, 3)
    batched = torch.vmap(lambda row: toy.op(row)[0])(x)
    assert torch.equal(batched, x * 2)
    gradient = torch.func.grad(lambda row: toy.op(row)[0].sum())(x[0])
    assert gradient.tolist() == [2.0] * 3
    _, tangent = torch.func.jvp(lambda row: toy.op(row)[0], (x[0],), (torch.ones(3),))
    assert tangent.tolist() == [2.0] * 3
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones(3))
        assert torch.autograd.forward_ad.unpack_dual(toy.op(dual)[0]).tangent is not None


def test_costs_add() -> None:
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_an_op_is_an_op(toy: Toy) -> None:
    assert isinstance(toy.op, Op)
    assert toy.op.cost(torch.ones(3)) == Cost(3, 24)
    assert [s.label for s in toy.op.samples("cpu", torch.float32)] == ["three"]


# --- passes of an Op's own, compositions, and Impls that an overload is told ---


class Scale:
    """`x * w` as an Op with passes of its own: it keeps `w` and the result, and not `x` unless told to."""

    def __init__(self, keep_x: bool = False, compose: bool = False) -> None:
        self.seen: list[Saved] = []
        self.backward_ran: list[str] = []
        outer = self

        def reference(x: Tensor, w: Tensor, bias: Tensor | None = None, label: str = "none") -> tuple[Tensor, Tensor]:
            """Scales."""
            return x * w, x + 1

        reference.__name__ = f"toy_{next(_numbers)}"
        self.op = op(cost=lambda *_: Cost(1, 1), samples=_samples)(reference)

        @self.op.impl("fast")
        def fast(x: Tensor, w: Tensor, bias: Tensor | None = None, label: str = "none") -> tuple[Tensor, Tensor]:
            """Quick."""
            outer.backward_ran.append("fast forward")
            return x.detach() * w.detach(), x.detach() + 1

        @self.op.impl("slow")
        def slow(x: Tensor, w: Tensor, bias: Tensor | None = None, label: str = "none") -> tuple[Tensor, Tensor]:
            """Not quick."""
            outer.backward_ran.append("slow forward")
            return x.detach() * w.detach(), x.detach() + 1

        def scale_backward(grad: Tensor, w: Tensor) -> Tensor:
            """The gradient of x."""
            return grad * w

        scale_backward.__name__ = f"{self.op.name}_backward"
        self.part = op(cost=lambda *_: Cost(1, 1), samples=_samples, follows=self.op.name)(scale_backward)

        @self.part.impl("fast")
        def fast_backward(grad: Tensor, w: Tensor) -> Tensor:
            """Quick."""
            outer.backward_ran.append("fast")
            return grad * w

        @self.part.impl("slow")
        def slow_backward(grad: Tensor, w: Tensor) -> Tensor:
            """Not quick."""
            outer.backward_ran.append("slow")
            return grad * w

        def forward(x: Tensor, w: Tensor, bias: Tensor | None = None, label: str = "none") -> tuple[Any, Any]:
            out, more = self.op(x, w, bias, label)
            return (out, more), (w, out, None, *((x,) if keep_x else ()))

        def backward(saved: Saved, grad: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
            self.seen.append(saved)
            w, out = saved.kept[:2]
            x = out / w
            dx = None if grad is None else self.part(grad, w)
            if more is not None:
                dx = more if dx is None else dx + more
            return dx, None if grad is None else (grad * x).sum_to_size(w.shape), None, None

        if compose:
            self.op.compose(lambda x, w, bias=None, label="none": (x * w, x + 1))
        else:
            self.op.differentiate(forward, backward)


@pytest.fixture
def scale() -> Iterator[Callable[..., Scale]]:
    made: list[Scale] = []

    def make(**options: bool) -> Scale:
        made.append(Scale(**options))
        return made[-1]

    yield make
    for each in made:
        del OPS[each.op.name], OPS[each.part.name]


def _xw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.rand(4, 3, dtype=dtype).add_(1).requires_grad_(), torch.rand(3, dtype=dtype).add_(1).requires_grad_()


@pytest.mark.parametrize("compose", [False, True])
@pytest.mark.parametrize("way", ["function", "overload", "with_backward"])
def test_an_op_is_differentiated_as_it_says(scale: Callable[..., Scale], way: str, compose: bool) -> None:
    toy = scale(compose=compose)
    run = {"function": toy.op, "overload": toy.op.overload, "with_backward": toy.op.with_backward("fast")}[way]
    x, w = _xw()
    assert torch.autograd.gradcheck(lambda x, w: run(x, w), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: run(x, w)[1], (x, w))
    assert bool(toy.seen) is not compose


def test_the_backward_pass_is_told_what_it_must_know(scale: Callable[..., Scale]) -> None:
    toy = scale()
    x, w = _xw()
    toy.op(x, w.detach(), label="a")[0].sum().backward()
    (saved,) = toy.seen
    assert saved.needed == (True, False, False, False)
    assert saved.args == (None, None, None, "a")
    assert len(saved.kept) == 3
    assert saved.kept[2] is None


def test_no_gradient_costs_nothing_to_keep(scale: Callable[..., Scale]) -> None:
    toy = scale()
    x, w = _xw()
    assert toy.op(x.detach(), w.detach())[0].grad_fn is None
    with torch.no_grad():
        assert toy.op(x, w)[0].grad_fn is None


@pytest.mark.parametrize("device_thread", [False, True])
def test_use_holds_in_the_backward_pass_too(scale: Callable[..., Scale], device_thread: bool) -> None:
    toy = scale()
    x, w = _xw(torch.float32)
    with use(**{toy.op.name: "slow"}):
        out = toy.op(x, w)[0].sum()
    if device_thread:  # as a backward pass on a GPU runs
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    else:
        out.backward()
    assert toy.backward_ran == ["slow forward", "slow"]
    toy.backward_ran.clear()
    toy.op(x, w)[0].sum().backward()
    assert toy.backward_ran == ["fast forward", "fast"]


def test_an_impl_that_a_part_lacks_is_refused(scale: Callable[..., Scale]) -> None:
    toy = scale()
    toy.op.impl("other")(lambda x, w, bias=None, label="none": (x * w, x + 1))
    x, w = _xw()
    with use(**{toy.op.name: "other"}):
        out = toy.op(x, w)[0].sum()
    with pytest.raises(ImplUnavailable, match=f"{toy.part.name} has no such Impl; it has fast, slow, reference"):
        out.backward()


def test_second_derivatives_need_every_argument(scale: Callable[..., Scale]) -> None:
    assert torch.autograd.gradgradcheck(lambda x, w: scale(keep_x=True).op(x, w), _xw())
    x, w = _xw()
    toy = scale()
    (grad,) = torch.autograd.grad(toy.op(x * 1, w)[0].sum(), w, retain_graph=True)
    assert grad.shape == w.shape
    with pytest.raises(RuntimeError, match=f"differentiated; for second derivatives .*{toy.op.name}='reference'"):
        torch.autograd.grad(toy.op(x * 1, w)[0].sum(), w, create_graph=True)


@pytest.mark.parametrize("way", ["function", "overload"])
def test_the_reference_that_is_asked_for_has_second_derivatives(scale: Callable[..., Scale], way: str) -> None:
    toy = scale()
    run = toy.op if way == "function" else toy.op.overload
    with use(**{toy.op.name: "reference"}):
        assert torch.autograd.gradgradcheck(lambda x, w: run(x, w), _xw())
    assert not toy.seen


def test_an_explicit_impl_of_a_composition_runs_its_forward_pass(scale: Callable[..., Scale]) -> None:
    toy = scale(compose=True)
    x, w = _xw(torch.float32)
    for run in (toy.op, toy.op.overload):
        toy.backward_ran.clear()
        with use(**{toy.op.name: "fast"}):
            run(x, w)[0].sum().backward()
        assert toy.backward_ran == ["fast forward"]
    toy.backward_ran.clear()
    toy.op(x, w)[0].sum().backward()
    assert toy.backward_ran == []


def test_an_overload_can_be_told_its_impl(toy: Toy) -> None:
    three, two = torch.ones(3), torch.ones(2)
    toy.op.overload(three, impl="reference")
    toy.op.overload(three, impl="fast")
    toy.op.overload(two, impl="fast")  # which it cannot take
    with use(**{toy.op.name: "fast"}):
        toy.op.overload(three, impl="reference")
    assert toy.ran == ["reference", "fast", "reference", "fast"]
    with pytest.raises(ValueError, match="has no Impl 'none'"):
        toy.op.overload(three, impl="none")


def test_an_impl_that_is_preferred_is_asked_again_about_other_addresses(toy: Toy) -> None:
    @toy.op.impl("aligned", why_not=lambda x, *_: ["x is not aligned"] if x.data_ptr() % 16 else [])
    def aligned(
        x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """Loads 16 bytes at once."""
        toy.ran.append("aligned")
        return x * factor, x + 1

    memory = torch.ones(8)
    for start in (0, 1, 4):
        toy.op.overload(memory[start : start + 3], impl="aligned")
    assert toy.ran == ["aligned", "fast", "aligned"]


def test_an_overload_can_be_told_how_to_run_its_impl(toy: Toy) -> None:
    ran: list[Any] = []

    @toy.op.impl("tiled", configs=lambda x, *_: ["a", "b"] if x.shape[0] > 2 else ["c"])
    def tiled(
        x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none", *, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Tiles."""
        ran.append(config)
        return x * factor, x + 1

    for size, impl in ((3, "tiled b"), (3, "tiled b"), (3, "tiled"), (2, "tiled b"), (2, "tiled c")):
        toy.op.overload(torch.ones(size), impl=impl)
    assert ran == ["b", "b", "a", "c", "c"]


def test_an_impl_that_is_preferred_is_not_looked_for_again(toy: Toy) -> None:
    asked: list[str] = []

    def why_not(x: Tensor, *_: Any) -> list[str]:
        asked.append("why_not")
        return []

    def configs(x: Tensor, *_: Any) -> list[str]:
        asked.append("configs")
        return ["a"]

    @toy.op.impl("tiled", why_not=why_not, configs=configs)
    def tiled(
        x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none", *, config: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Tiles."""
        return x * factor, x + 1

    for _ in range(3):
        toy.op.overload(torch.ones(3), impl="tiled")
    assert asked == ["why_not", "configs"]
    toy.op.overload(torch.ones(4), impl="tiled")
    toy.op.overload(torch.ones(3), torch.ones(3), impl="tiled")
    toy.op.overload(torch.ones(6)[::2], impl="tiled")
    toy.op.overload(torch.ones(3), factor=3.0, impl="tiled")
    assert asked == ["why_not", "configs"] * 5


def test_an_impl_that_is_preferred_gives_way_to_use_and_keeps_out_autocast(toy: Toy) -> None:
    @toy.op.impl("product")
    def product(
        x: Tensor, shift: Tensor | None = None, factor: float = 2.0, label: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """Which autocast would do in bfloat16."""
        toy.ran.append("product")
        return x.diag() @ x, x + 1

    x = torch.ones(3)
    for _ in range(2):
        toy.op.overload(x, impl="product")
        with use(**{toy.op.name: "fast"}):
            toy.op.overload(x, impl="product")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert toy.op.overload(x, impl="product")[0].dtype == torch.float32
    assert toy.ran == ["product", "fast", "product"] * 2


def test_what_is_remembered_of_preferred_impls_is_bounded(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.op._MOST_PREFERRED", 4)
    for size in range(3, 20):
        toy.op.overload(torch.ones(size), impl="fast")
        assert 1 <= len(toy.op._preferred) <= 4
    assert set(toy.ran) == {"fast"}


def test_values_on_a_cpu_are_checked_in_each_call() -> None:
    def check(x: Tensor) -> None:
        if x.device.type == "cpu" and (x < 0).any():
            raise ValueError("x has a number below 0")

    def reference(x: Tensor) -> Tensor:
        """Copies."""
        return x.clone()

    reference.__name__ = f"toy_{next(_numbers)}"
    toy = op(cost=lambda x: Cost(1, 1), samples=_samples, check=check)(reference)
    try:
        toy.overload(torch.ones(3), impl="reference")
        with pytest.raises(ValueError, match="below 0"):
            toy.overload(-torch.ones(3), impl="reference")
    finally:
        del OPS[toy.name]


@pytest.mark.parametrize("impl", ["", "fast"])
@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_who_looks_on_sees_the_overload_in_any_mode(
    toy: Toy, impl: str, gradients: Callable[[], AbstractContextManager[None]]
) -> None:
    seen: list[Any] = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with gradients():
        toy.op.overload(x, impl=impl)  # nobody looks on
        with Listen():
            toy.op.overload(x, impl=impl)
        with FakeTensorMode() as mode:
            assert type(toy.op.overload(mode.from_tensor(x), impl=impl)[0]) is FakeTensor
        assert type(toy.op.overload(x.to("meta"), impl=impl)[0]) is Tensor
    assert seen == [toy.op.overload]
    assert toy.ran == ["fast", "fast", "reference", "reference"]
    functional = torch.func.functionalize(lambda x: toy.op.overload(x, impl=impl)[0])
    assert functional(x).tolist() == [2.0, 2.0, 2.0]
