"""`OptimizedModule` by itself: what one signature is, who makes entries, and when the original runs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.runtime import module
from burnish.runtime.module import STALE, Call, Entry, OptimizedModule, original_entry


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x: Tensor, scale: Any = None, *, shift: Any = 0) -> Any:
        self.calls += 1
        return x * self.weight


class Resolver:
    """Makes entries that return their own number; `stale` of them say so at their next call."""

    def __init__(self) -> None:
        self.entries: list[tuple[Call, bool]] = []
        self.forgotten = 0
        self.stale = 0

    def entry(self, call: Call, differentiable: bool) -> tuple[Entry, Any]:
        self.entries.append((call, differentiable))
        number = len(self.entries)

        def run(call: Call) -> Any:
            if self.stale:
                self.stale -= 1
                return STALE
            return number

        return run, STALE

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def resolver() -> Resolver:
    return Resolver()


@pytest.fixture
def fast(resolver: Resolver) -> OptimizedModule:
    return OptimizedModule(Model(), resolver)


X = torch.zeros(2, 3)


def original_calls(fast: OptimizedModule) -> int:
    calls: int = fast._original.calls
    return calls


@torch.no_grad()
def test_one_signature_is_resolved_once(fast: OptimizedModule, resolver: Resolver) -> None:
    assert [fast(X), fast(torch.ones(2, 3)), fast(x=X), fast(X, None) - 1] == [1, 1, 1, 1]
    assert original_calls(fast) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.zeros(3, 3),), {}),
        ((X.double(),), {}),
        ((X.to("meta"),), {}),
        ((torch.zeros(3, 2).t(),), {}),
        ((torch.zeros(1, 3).expand(2, 3),), {}),
        ((torch.zeros(2, 3, 1),), {}),
        ((X, None), {}),
        ((X, X), {}),
        ((X, 1), {}),
        ((X,), {"shift": 1}),
        (([X],), {}),
        (({"x": X},), {}),
    ],
)
def test_what_makes_another_signature(
    args: tuple[Any, ...], kwargs: dict[str, Any], fast: OptimizedModule, resolver: Resolver
) -> None:
    assert fast(X) == 1
    assert fast(*args, **kwargs) == 2
    assert (fast(X), fast(*args, **kwargs)) == (1, 2)


@torch.no_grad()
def test_constants_that_are_equal_are_told_apart_by_their_type(fast: OptimizedModule) -> None:
    assert [fast(X, value) for value in (1, 1.0, True, "1", 1)] == [1, 2, 3, 4, 1]


def test_gradients_make_another_signature(fast: OptimizedModule, resolver: Resolver) -> None:
    assert fast(X) == 1
    with torch.no_grad():
        assert fast(X) == 2
    fast.requires_grad_(False)
    assert fast(X) == 2
    assert fast(X.clone().requires_grad_()) == 3
    assert [differentiable for _, differentiable in resolver.entries] == [True, False, True]


@torch.no_grad()
def test_train_and_eval_make_another_signature(fast: OptimizedModule) -> None:
    assert fast(X) == 1
    assert fast.eval()(X) == 2
    fast._original.train()
    assert fast.training
    assert fast(X) == 1


@torch.no_grad()
def test_positional_arguments_get_their_names(fast: OptimizedModule, resolver: Resolver) -> None:
    fast(X, 2, shift=1)
    fast(shift=1, scale=2, x=X)
    ((call, _),) = resolver.entries
    assert call.args == ()
    assert list(call.kwargs) == ["scale", "shift", "x"]
    assert call.leaves == [2, 1, X]


@torch.no_grad()
def test_positional_arguments_without_names_stay_positional(resolver: Resolver) -> None:
    class Variadic(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return tensors[0]

    fast = OptimizedModule(Variadic(), resolver)
    assert (fast(X, X), fast(X)) == (1, 2)
    assert resolver.entries[0][0].args == (X, X)


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [object(), torch.nn.Parameter, X.to_sparse(), {1, 2}, torch.float32, b"bytes"],
    ids=["object", "class", "sparse", "set", "dtype", "bytes"],
)
def test_what_no_graph_takes_is_the_originals(given: Any, fast: OptimizedModule, resolver: Resolver) -> None:
    result = fast(X, given)
    assert torch.equal(result, X)
    assert original_calls(fast) == 1
    assert not resolver.entries


@torch.no_grad()
def test_a_structure_that_cannot_be_looked_up_is_the_originals(
    fast: OptimizedModule, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytree.TreeSpec, "__hash__", None)  # its context may hold anything
    assert isinstance(fast(X, [1]), Tensor)
    assert not resolver.entries
    assert fast(X) == 1


@torch.no_grad()
def test_tensor_subclasses_are_the_originals(fast: OptimizedModule, resolver: Resolver) -> None:
    class Named(Tensor):
        pass

    assert isinstance(fast(X.as_subclass(Named)), Tensor)
    assert not resolver.entries


@torch.no_grad()
def test_what_autocast_casts_to_is_part_of_the_signature(fast: OptimizedModule) -> None:
    assert fast(X) == 1
    for dtype, entry in ((torch.bfloat16, 2), (torch.float16, 3), (torch.bfloat16, 2)):
        with torch.autocast("cpu", dtype=dtype):
            assert fast(X) == entry
    assert fast(X) == 1


@pytest.mark.parametrize(("args", "kwargs"), [((X, 1, 2), {}), ((X,), {"x": X})], ids=["too many", "twice"])
def test_calls_that_do_not_fit_are_the_originals(
    args: tuple[Any, ...], kwargs: dict[str, Any], fast: OptimizedModule, resolver: Resolver
) -> None:
    with pytest.raises(TypeError, match="forward"):
        fast(*args, **kwargs)


@torch.no_grad()
def test_moved_weights_are_forgotten_and_resolved_anew(fast: OptimizedModule, resolver: Resolver) -> None:
    assert (fast(X), fast(X[:1])) == (1, 2)
    resolver.stale = 1
    assert fast(X) == 3
    assert resolver.forgotten == 1
    assert (fast(X), fast(X[:1])) == (3, 4)


@torch.no_grad()
def test_weights_that_keep_moving_leave_it_to_the_original(fast: OptimizedModule, resolver: Resolver) -> None:
    fast(X)
    resolver.stale = 2
    assert isinstance(fast(X), Tensor)
    assert original_calls(fast) == 1
    assert isinstance(fast(X), int)


@torch.no_grad()
def test_entries_are_not_kept_without_end(
    fast: OptimizedModule, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    for number in range(5):
        assert fast(X, number) == number + 1
    assert len(fast._entries) == 3
    assert fast(X, 4) == 5
    assert fast(X, 0) == 6


@torch.no_grad()
def test_an_error_while_resolving_leaves_nothing(fast: OptimizedModule, resolver: Resolver) -> None:
    def fail(call: Call, differentiable: bool) -> tuple[Entry, Any]:
        raise IndexError("index out of range")

    resolver.entry = fail  # type: ignore[method-assign]
    with pytest.raises(IndexError):
        fast(X)
    del resolver.entry
    assert fast(X) == 1


def test_two_threads_resolve_a_signature_once(fast: OptimizedModule, resolver: Resolver) -> None:
    inside, go_on = threading.Event(), threading.Event()
    resolve = resolver.entry

    def slowly(call: Call, differentiable: bool) -> tuple[Entry, Any]:
        inside.set()
        assert go_on.wait(10)
        return resolve(call, differentiable)

    resolver.entry = slowly  # type: ignore[method-assign]
    results: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            results.append(fast(X))

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [1, 1]
    assert len(resolver.entries) == 1


@torch.no_grad()
def test_a_result_that_came_by_the_way_is_returned(fast: OptimizedModule, resolver: Resolver) -> None:
    resolver.entry = lambda call, differentiable: (original_entry(fast._original), "by the way")  # type: ignore[method-assign,assignment,return-value]
    assert fast(X) == "by the way"
    assert torch.equal(fast(X), X)


def test_it_shares_parameters_and_buffers(fast: OptimizedModule) -> None:
    model = fast._original
    assert fast.weight is model.weight
    model.register_buffer("late", torch.ones(1))
    assert fast.late is model.late
    fast.weight = nn.Parameter(torch.zeros(3))
    assert model.weight is fast.weight
    assert list(fast.state_dict()) == list(model.state_dict())
