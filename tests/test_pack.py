"""Packed weights: one tensor of which the parameters are views; found again, and left alone where they must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from burnish.capture import Program, capture
from burnish.numerics import assert_close
from burnish.pack import Pack, pack
from burnish.record import StepRecord
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import outputs_in_float64

WIDTH = 16
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def always(weight: fx.Node) -> bool:
    return True


def never(weight: fx.Node) -> bool:
    return False


class Layer(nn.Module):
    """q, k, v (the keys without a bias, as in Whisper) and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x) + torch.cat([self.k(x), self.v(x)], -1)
        return self.down(F.silu(self.gate(q)) * self.up(q))


def packed(
    model: nn.Module, wants_transposed: Callable[[fx.Node], bool], *inputs: Tensor
) -> tuple[Program, list[Pack], StepRecord]:
    program = capture(model, inputs or (X,))
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        apply(name, rewrites, program.graph_module)
    packs, record = pack(program.graph_module, model, wants_transposed)
    return program, packs, record


def assert_right(program: Program, model: nn.Module, *inputs: Tensor) -> None:
    leaves = list(inputs or (X,))
    with torch.no_grad():
        result, eager = program.graph_module(*leaves), model(*leaves)
    eager = list(eager) if isinstance(eager, tuple) else [eager]
    assert_close(list(result), eager, outputs_in_float64(program.captured, leaves))


def storages(*tensors: Tensor) -> int:
    """Bytes of the distinct storages behind the tensors."""
    distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(distinct.values())


def members(packs: list[Pack]) -> list[list[str]]:
    return [[member.path for member in each.members] for each in packs]


@pytest.fixture
def model() -> Layer:
    torch.manual_seed(0)
    return Layer().eval()


@pytest.mark.parametrize("wants_transposed", [always, never])
def test_the_model_keeps_its_values_names_and_size(wants_transposed: Callable[..., bool], model: Layer) -> None:
    before, size = copy.deepcopy(model.state_dict()), storages(*model.parameters())
    parameters = dict(model.named_parameters())
    program, packs, record = packed(model, wants_transposed)
    together = [["q.bias", "v.bias"], ["q.weight", "k.weight", "v.weight"], ["gate.bias", "up.bias"]]
    assert members(packs)[:4] == [*together, ["gate.weight", "up.weight"]]
    assert record.matches == {"weights packed together": 4, "stored (K, N)": 3 if wants_transposed is always else 0}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    zeros = 8 * X.element_size()  # in place of the bias that the keys do not have
    assert storages(*model.parameters(), *program.graph_module.buffers()) == size + zeros
    assert_right(program, model)


def test_storage_follows_the_wish(model: Layer) -> None:
    asked: list[torch.Size] = []

    def tall(weight: fx.Node) -> bool:
        asked.append(weight.meta["val"].shape)
        return bool(weight.meta["val"].shape[0] == 48)

    program, packs, _ = packed(model, tall)
    assert sorted(asked) == [(16, 24), (32, 16), (48, 16)], "matrices that products read, once each"
    assert [each.transposed for each in packs] == [False, False, False, True]
    buffers = dict(program.graph_module.named_buffers())
    for each in packs:
        tensor = buffers[each.name]
        assert (tensor.t() if each.transposed else tensor).is_contiguous()
    assert model.gate.weight.stride() == (1, 48)
    assert model.q.weight.is_contiguous()


@pytest.mark.parametrize("wants_transposed", [always, never])
def test_changes_in_place_reach_the_packed_weights(wants_transposed: Callable[..., bool], model: Layer) -> None:
    program, *_ = packed(model, wants_transposed)
    torch.manual_seed(1)
    model.load_state_dict(Layer().state_dict())
    assert_right(program, model)
    with torch.no_grad():
        model.v.weight.mul_(3)
        model.v.bias.add_(1)
    assert_right(program, model)


@pytest.mark.parametrize("second", [always, never])
@pytest.mark.parametrize("first", [always, never])
def test_a_packing_that_is_there_is_kept(first: Callable[..., bool], second: Callable[..., bool], model: Layer) -> None:
    one, *_ = packed(model, first)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters() if name != "down.weight"}
    other, packs, _ = packed(model, second)
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name != "down.weight"} == pointers
    shared = [each.name for each in packs if len(each.members) > 1]
    for name in shared:
        assert other.graph_module.get_buffer(name).data_ptr() == one.graph_module.get_buffer(name).data_ptr()
    assert_right(one, model)
    assert_right(other, model)


def test_a_parameter_that_has_moved_is_packed_again(model: Layer) -> None:
    packed(model, always)
    model.k.weight = nn.Parameter(torch.randn(8, WIDTH))
    program, *_ = packed(model, always)
    assert_right(program, model)
    assert storages(model.q.weight, model.k.weight, model.v.weight) == 32 * WIDTH * X.element_size()


# --- what is left alone ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_a_tied_embedding_is_left_alone() -> None:
    model, ids = Tied().eval(), torch.randint(32, (2, 5))
    pointer = model.head.weight.data_ptr()
    program, packs, record = packed(model, always, ids)
    assert packs == []
    assert record.near_misses == []
    assert model.embedding.weight.data_ptr() == model.head.weight.data_ptr() == pointer
    assert model.head.weight.is_contiguous()
    assert_right(program, model, ids)


class Pair(nn.Module):
    """Two products of one input, with the second's weight put there by the test."""

    def __init__(self, second: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 8, bias=False)
        if isinstance(second, nn.Parameter):
            self.b.weight = second
        else:
            del self.b.weight
            self.b.register_buffer("weight", second)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.a.weight), F.linear(x, self.b.weight)


class Special(nn.Parameter):
    """Some library's own kind of parameter."""


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (torch.randn(8, WIDTH), "a weight is not a parameter of the model"),
        (Special(torch.randn(8, WIDTH)), "a weight is not a plain tensor"),
    ],
    ids=["buffer", "subclass"],
)
def test_weights_that_cannot_be_packed(second: Any, reason: str) -> None:
    model = Pair(second)
    pointers = [model.a.weight.data_ptr(), model.b.weight.data_ptr()]
    program, packs, record = packed(model, never)
    assert packs == []
    assert [miss.reason for miss in record.near_misses] == [reason]
    assert [model.a.weight.data_ptr(), model.b.weight.data_ptr()] == pointers
    assert_right(program, model)


class Crossed(nn.Module):
    """One attention's weights for products of several inputs, those in `together` of the same one."""

    def __init__(self, *together: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.together = together

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        calls = zip(inputs, self.together, strict=True)
        return tuple(getattr(self, name)(x) for x, names in calls for name in names)


@pytest.mark.parametrize("wants_transposed", [always, never])
@pytest.mark.parametrize(
    ("together", "kept"),
    [(("qkv", "kv"), ["qkv", "kv"]), (("kv", "qkv"), ["qkv", "kv"]), (("qk", "kv"), ["qk"])],
    ids=["within", "within, first", "across"],
)
def test_no_packing_tears_another_apart(
    together: tuple[str, ...], kept: list[str], wants_transposed: Callable[..., bool]
) -> None:
    model, inputs = Crossed(*together).eval(), (X, X + 1)
    program, packs, record = packed(model, wants_transposed, *inputs)
    assert sorted(members(packs)) == sorted(
        [f"{n}.{kind}" for n in names] for names in kept for kind in ("weight", "bias")
    )
    assert record.matches["weights packed together"] == len(packs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert_right(program, model, *inputs)


def test_a_packing_that_would_tear_another_apart_is_told() -> None:
    _, _, record = packed(Crossed("qk", "kv").eval(), never, X, X + 1)
    (miss,) = record.near_misses
    assert (miss.reason, len(miss.nodes)) == ("a weight is packed with others already", 2)


class Columns(nn.Module):
    """Weights that are stored (K, N), as GPT-2's; one of them something else reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, x.view(-1, WIDTH), self.first)
        return torch.addmm(self.bias, x, self.second) + self.second.sum()


def test_on_cuda_columns_are_stored_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Columns()
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _, _, record = packed(model, never)
    assert "stored (N, K)" not in record.matches
    monkeypatch.setattr("torch._subclasses.FakeTensor.is_cuda", True)
    program, packs, record = packed(model, never)
    monkeypatch.undo()
    assert record.matches["stored (N, K)"] == 1
    assert not packs
    assert model.first.t().is_contiguous()
    assert model.second.is_contiguous()
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert_right(program, model)
    assert "stored (N, K)" not in packed(model, never)[2].matches
