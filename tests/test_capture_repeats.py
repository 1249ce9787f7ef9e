"""Looking results up while tracing: the graph is the one that torch's own tracing makes, whatever layers differ in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor

from burnish import capture_repeats
from burnish.capture import CaptureError, Program, capture
from burnish.capture_repeats import repeats_looked_up

WIDTH = 8
KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda y, first: torch.relu(y),
    "scaled": lambda y, first: y * 0.5,
    "halves": lambda y, first: torch.cat((-y[..., WIDTH // 2 :], y[..., : WIDTH // 2]), -1),
    "shared": lambda y, first: y + first,
    "wider": lambda y, first: y.double().relu().to(y.dtype),
    "moved": lambda y, first: y.transpose(0, 1).contiguous().transpose(0, 1),
    "heads": lambda y, first: y.view(*y.shape[:-1], 2, -1).softmax(-1).flatten(-2),
    "split": lambda y, first: torch.cat(y.split([2, 6], -1)[::-1], -1),
    "in place": lambda y, first: y.mul_(2),
    "written": lambda y, first: torch.zeros_like(y).copy_(y * 2),
}


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.dropout, self.kind = nn.Linear(WIDTH, WIDTH), nn.Dropout(), kind

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return x + self.dropout(KINDS[self.kind](self.linear(x), first))


class Layers(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x


@contextlib.contextmanager
def nothing_looked_up() -> Iterator[Any]:
    yield SimpleNamespace(found=0)


def captured(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, *inputs: Tensor, without: bool = False
) -> tuple[Program, int]:
    """The Program, and how many calls were looked up."""
    found = 0

    @contextlib.contextmanager
    def watched() -> Iterator[Any]:
        nonlocal found
        with nothing_looked_up() if without else repeats_looked_up() as repeats:
            yield repeats
            found = repeats.found

    with monkeypatch.context() as patch:
        patch.setattr("burnish.capture.repeats_looked_up", watched)
        return capture(model, inputs), found


def described(program: Program) -> list[Any]:
    """All but the names of the captured nodes."""
    number = {node: i for i, node in enumerate(program.captured.graph.nodes)}

    def value(node: fx.Node) -> Any:
        found = node.meta.get("val")
        if not isinstance(found, Tensor):
            return str(found)
        sources = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        shared = [s.untyped_storage()._cdata == found.untyped_storage()._cdata for s in sources]
        return str(found.shape), str(found.stride()), str(found.storage_offset()), found.dtype, found.device, shared

    return [
        (
            node.op,
            node.target,
            str(fx.node.map_arg((node.args, node.kwargs), lambda n: f"n{number[n]}")),
            value(node),
            node.meta.get("stack_trace"),
            str(node.meta.get("nn_module_stack")),
            str(node.meta.get("tensor_meta")),
        )
        for node in number
    ]


def test_the_graph_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Layers(*KINDS, *KINDS, *reversed(KINDS)).eval(), torch.randn(2, 5, WIDTH)
    program, found = captured(monkeypatch, model, x)
    plain, none = captured(monkeypatch, model, x, without=True)
    assert found > 90
    assert none == 0
    assert described(program) == described(plain)
    assert program.inputs == plain.inputs
    other = torch.randn(3, 7, WIDTH)
    assert torch.equal(program.graph_module(other)[0], model(other))


def test_sizes_that_are_found_equal_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Caches(nn.Module):
        def forward(self, x: Tensor, *caches: Tensor) -> Tensor:
            for cache in caches:
                torch._check(cache.shape[0] == x.shape[0])
                x = (x + cache).relu() * 2
            return x

    inputs = [torch.randn(3, 5, WIDTH) for _ in range(9)]
    program, found = captured(monkeypatch, Caches(), *inputs)
    plain, _ = captured(monkeypatch, Caches(), *inputs, without=True)
    assert found >= 14  # of relu and mul in the layers after the first
    assert described(program) == described(plain)
    assert program.inputs == plain.inputs


def test_what_goes_wrong_with_lookups_is_traced_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("torch has changed")

    model, x = Layers(*["plain"] * 3).eval(), torch.randn(2, 5, WIDTH)
    plain, _ = captured(monkeypatch, model, x, without=True)
    monkeypatch.setattr(capture_repeats, "_repeat", fail)
    program, found = captured(monkeypatch, model, x)
    assert found == 1
    assert described(program) == described(plain)


def test_errors_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "branches", lambda y, first: y if y.sum() > 0 else -y)
    model, x = Layers(*["plain"] * 3, "branches").eval(), torch.randn(2, 5, WIDTH)
    errors = []
    for without in (False, True):
        with pytest.raises(CaptureError) as error:
            captured(monkeypatch, model, x, without=without)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


class Without:
    """A module that lacks a name; for the rest it is the module."""

    def __init__(self, module: Any, name: str) -> None:
        vars(self).update(_module=module, _name=name)

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


@pytest.mark.parametrize("name", ["proxy_call", "fetch_sym_proxy", "extract_val", "_ProxyTensor"])
def test_a_torch_without_one_of_its_private_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Layers(*["plain"] * 3).eval(), torch.randn(2, 5, WIDTH)
    plain, _ = captured(monkeypatch, model, x, without=True)
    original = proxy_tensor.proxy_call
    monkeypatch.setattr(capture_repeats, "proxy_tensor", Without(proxy_tensor, name))
    program, found = captured(monkeypatch, model, x)
    assert found == 0
    assert described(program) == described(plain)
    assert proxy_tensor.proxy_call is original
