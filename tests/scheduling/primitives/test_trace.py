"""`trace`: modules as graphs that serve train and eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import burnish
from tests.scheduling.models import Attention, Stack
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs, fingerprint


def test_submodules_stay_calls_or_become_part_of_it():
    model = Attention().eval()
    sch = burnish.create_schedule(model)
    sch.trace()
    assert isinstance(sch.mod, fx.GraphModule)
    assert "self.self_attn(x)" in sch.mod.code
    assert type(sch.mod.self_attn).__name__ == "SelfAttention"
    sch.trace(flatten=True)
    assert "self.self_attn.q_proj(x)" in sch.mod.code
    built = sch.build()
    assert_same_outputs(built, model, torch.randn(2, 5, 32))
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=torch.randn(2, 5, 32))


def test_the_printed_module_is_still_the_models():
    model = Attention()
    model.config = {"width": 32}
    sch = burnish.create_schedule(model)
    sch.trace()
    assert str(sch.mod).splitlines()[:3] == str(model).splitlines()[:3]
    assert sch.mod.config == {"width": 32}


class Modes(nn.Module):
    """Reads its own flag: as an argument, as a scale, and in a condition on constants."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        return x * (3.0 if self.training else 2.0)


@pytest.mark.parametrize("training", [True, False])
def test_constants_follow_the_mode(training):
    model = nn.Sequential(Modes())
    sch = burnish.create_schedule(model.train(training))
    sch.trace(flatten=True)
    sch.trace()
    built = sch.build()
    for mode in (True, False):
        built.train(mode)
        model.train(mode)
        results = []
        for module in (built, model):
            torch.manual_seed(0)
            results.append(module(torch.ones(64)))
        assert torch.equal(*results)


def test_other_steps_in_train_than_in_eval():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) if self.training else torch.cos(x)

    sch = burnish.create_schedule(nn.Sequential(Branching()))
    before = fingerprint(sch.mod)
    with pytest.raises(ValueError, match=r"0 \(Branching\) cannot be traced: train and eval mode take different steps"):
        sch["0"].trace()
    assert fingerprint(sch.mod) == before


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, **kwargs: object) -> Tensor:
        x = self.inner(x) * scale
        return x if mask is None else x * mask


class Caller(nn.Module):
    def __init__(self, given: bool) -> None:
        super().__init__()
        self.masked = Masked()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x, mask=x > 0) if self.given else self.masked(x)


@pytest.mark.parametrize("given", [True, False])
def test_example_inputs_tell_which_arguments_are_given(given):
    model = Caller(given).eval()
    x = torch.randn(2, 5, 32)
    sch = burnish.create_schedule(model, (x,))
    sch["masked"].trace()
    assert_same_outputs(sch.build(), model, x)
    assert_same_names(sch.build(), model)


def test_without_example_inputs_other_calls_raise():
    x = torch.randn(2, 5, 32)
    for given in (True, False):
        sch = burnish.create_schedule(Caller(given).eval())
        sch["masked"].trace()
        if given:
            with pytest.raises(ValueError, match="mask: the module was traced for None and got a tensor"):
                sch.build()(x)
        else:
            assert_same_outputs(sch.build(), sch.original, x)
        sch["masked"].trace()  # once more: the graph still refuses
        if given:
            with pytest.raises(ValueError, match="mask: the module was traced for None and got a tensor"):
                sch.build()(x)


def test_an_optional_argument_that_is_only_passed_on():
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.masked = Masked()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.masked(x, mask)

    model = Passing().eval()
    sch = burnish.create_schedule(model)
    sch.trace()
    x = torch.randn(2, 5, 32)
    assert_same_outputs(sch.build(), model, x)
    assert_same_outputs(sch.build(), model, x, x > 0)


def test_what_is_not_in_the_graph_stays_in_the_module():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("kept", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.kept

    model = Unused()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    sch = burnish.create_schedule(model)
    sch.trace()
    built = copy.deepcopy(sch.build())
    built(torch.ones(4))
    assert seen == [1]
    assert_same_outputs(built, model, torch.ones(4))
    assert_same_names(built, model)
    assert dict(sch.mod.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_checkpointed_and_hooked_submodules_stay_whole():
    model = Stack(2)
    model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    sch = burnish.create_schedule(model)
    sch["layers.1"].checkpoint()
    sch.trace(flatten=True)
    assert "self_attn(" in sch.mod.code
    assert 'getattr(self.layers, "1")(' in sch.mod.code
    assert sch["layers.1"].mod.__dict__["forward"].__self__ is sch["layers.1"].mod


def test_a_checkpointed_module_stays_so_when_it_is_traced():
    model = Attention()
    sch = burnish.create_schedule(model)
    sch.checkpoint()
    sch.trace()
    assert sch.mod.__dict__["forward"].__self__ is sch.mod
    with pytest.raises(ValueError, match="checkpointed already"):
        sch.checkpoint()


def test_a_forward_that_was_replaced_on_the_instance():
    model = Attention()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="Attention cannot be traced: its forward was replaced by another function"):
        burnish.create_schedule(model).trace()
