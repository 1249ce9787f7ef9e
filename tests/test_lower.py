"""The generated code: one slot for each Op, weights read where they live, and everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish import ops
from burnish.capture import Program, capture
from burnish.lower import Executable
from burnish.numerics import assert_close
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import outputs_in_float64

WIDTH, VOCAB = 16, 11


class Model(nn.Module):
    """Calls most of what the generated code calls by another name, two linears that share a weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=1)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH))
        self.scale: Tensor
        self.shift = torch.rand(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        batch, length, _ = x.shape
        x = torch.add(x, self.first(x), alpha=2) + 1
        heads = x.view(batch, length, 2, WIDTH // 2).permute(0, 2, 1, 3).transpose(2, 3)
        x = x + heads.reshape(batch, length, WIDTH) * self.scale + self.shift.unsqueeze(0).expand(length, WIDTH)
        return self.norm(self.second(x) * F.linear(x, self.first.weight, self.second.bias) * 0.5)


def ids_of(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def program(model: Model) -> Program:
    program = capture(model, (ids_of(),))
    apply("raise", RAISE, program.graph_module)
    return program


@pytest.fixture
def executable(program: Program, model: Model) -> Executable:
    return Executable(program.graph_module, model)


def run(executable: Executable, ids: Tensor, chosen: dict[str, Callable[..., Any]] | None = None) -> Tensor:
    with torch.no_grad():
        (result,) = executable.bind(chosen or {})(executable.read_weights(), [ids])
    return result


def test_unbound_code_computes_what_the_graph_does(program: Program, executable: Executable) -> None:
    for ids in (ids_of(2, 6), ids_of(3, 9), ids_of(1, 1)):
        with torch.no_grad():
            eager = program.captured(ids)
        assert_close([run(executable, ids)], list(eager), outputs_in_float64(program.captured, [ids]))


def test_each_op_is_a_slot_in_the_order_of_execution(executable: Executable) -> None:
    assert [slot.name for slot in executable.slots] == ["linear_0", "linear_1", "linear_2", "layer_norm_3"]
    assert all(slot.name in executable.source for slot in executable.slots)
    assert "torch.ops" not in executable.source


def test_a_slot_calls_what_is_bound_to_it_and_no_other_does(executable: Executable) -> None:
    seen: list[tuple[Any, ...]] = []

    def spy(*args: Any) -> Tensor:
        seen.append(args)
        return F.linear(*args[:3]) * 0

    plain, bound = executable.bind({}), executable.bind({"linear_1": spy})
    with torch.no_grad():
        (zeroed,) = bound(executable.read_weights(), [ids_of()])
        (result,) = plain(executable.read_weights(), [ids_of()])
    assert [len(args) for args in seen] == [5], "once, with every argument of the Op"
    assert seen[0][3:] == ("none", None)
    assert not torch.allclose(zeroed, result)
    assert torch.equal(result, run(executable, ids_of()))


def test_weights_are_the_models_own_each_once(executable: Executable, model: Model) -> None:
    owned = {**dict(model.named_parameters()), **dict(model.named_buffers()), "shift": model.shift}
    weights = executable.read_weights()
    assert len(weights) == len(owned)
    pointers = {tensor.data_ptr(): name for name, tensor in owned.items()}
    assert {pointers[weight.data_ptr()] for weight in weights} == set(owned)


def test_a_replaced_weight_is_seen(executable: Executable, model: Model) -> None:
    before = run(executable, ids_of())
    model.norm.bias = nn.Parameter(torch.ones(WIDTH))  # it was zero
    assert torch.equal(run(executable, ids_of()), before + 1)


def test_wide_ops_are_slots_too() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x + y), x + y

    model, inputs = Sum(), [torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)]
    program = capture(model, tuple(inputs))
    for name, rewrites in (("raise", RAISE), ("fuse", FUSE)):
        apply(name, rewrites, program.graph_module)
    executable = Executable(program.graph_module, model)
    (slot,) = executable.slots
    assert slot.name == "add_layer_norm_0"
    with torch.no_grad():
        normed, total = executable.bind({})(executable.read_weights(), inputs)
        eager = model(*inputs)
    assert_close([normed, total], list(eager), outputs_in_float64(program.captured, inputs))


def test_a_slot_gets_the_defaults_too() -> None:
    """Capture leaves out arguments that equal their defaults; an Impl takes every one."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.rms_norm(x)

    program = capture(Norm(), (torch.randn(2, 3, WIDTH),))
    executable = Executable(program.graph_module)
    given: list[tuple[Any, ...]] = []
    executable.bind({"rms_norm_0": lambda *args: given.append(args)})([], [torch.randn(2, 3, WIDTH)])
    assert [args[1:] for args in given] == [(None, 1e-6)]


def test_numbers_from_inputs_come_before_what_computes() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor, length: Tensor) -> Tensor:
            return F.silu(F.linear(x, x)) * (length + 1) * (x + length)

    inputs = torch.rand(3, 3), torch.tensor(2)
    program = capture(Reads(), inputs)
    apply("raise", RAISE, program.graph_module)
    lines = Executable(program.graph_module).source.splitlines()
    (first,) = (i for i, line in enumerate(lines) if "linear_0" in line)
    added = [i for i, line in enumerate(lines) if "torch.add(" in line or "torch_add(" in line]
    assert [i < first for i in added] == [True, False]
    (result,) = Executable(program.graph_module).bind({})([], list(inputs))
    assert_close(result, Reads()(*inputs), Reads()(*(each.double() for each in inputs)))
