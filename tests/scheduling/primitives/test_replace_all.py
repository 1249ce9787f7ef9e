"""`replace_all`: every module of one type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import burnish
from tests.scheduling.models import Stack
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs, fingerprint


class Norm(nn.Module):
    """A LayerNorm's weights, another spelling."""

    def __init__(self, old: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = old.weight, old.bias, old.eps

    from_modules = classmethod(lambda cls, old: cls(old))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return centered * (centered.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


@pytest.mark.parametrize("make", [Norm, lambda old: Norm(old)])
def test_all_of_one_type_with_their_weights(make):
    model = Stack(3).eval()
    sch = burnish.create_schedule(model)
    assert sch.replace_all(nn.LayerNorm, make).matches == 3
    built = sch.build()
    assert sum(isinstance(module, Norm) for module in built.modules()) == 3
    assert_same_outputs(built, model, torch.randn(2, 5, 32))
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=torch.randn(2, 5, 32))


def test_only_below_and_only_exactly_the_type():
    class OtherNorm(nn.LayerNorm):
        pass

    model = Stack(2)
    model.layers[0].proj.layer_norm = OtherNorm(32)
    sch = burnish.create_schedule(model)
    assert sch["layers.1"].replace_all(nn.LayerNorm, lambda old: nn.Identity()).matches == 1
    assert type(sch.mod.layers[0].proj.layer_norm) is OtherNorm


def test_a_module_in_two_places_is_made_once():
    norm = nn.LayerNorm(4)
    made: list[nn.Module] = []
    sch = burnish.create_schedule(nn.Sequential(norm, norm))
    sch.replace_all(nn.LayerNorm, lambda old: made.append(nn.Identity()) or made[-1])
    assert len(made) == 1
    assert sch.mod[0] is sch.mod[1] is made[0]


@pytest.mark.parametrize(
    ("kind", "make", "error", "message"),
    [
        (nn.BatchNorm1d, nn.Identity, ValueError, "replace_all: Stack has no BatchNorm1d"),
        ("LayerNorm", nn.Identity, TypeError, "kind must be a class of modules .*, got 'LayerNorm'"),
        (nn.LayerNorm, 3, TypeError, "make must be a function of the old module, got int"),
        (nn.LayerNorm, lambda old: None, ValueError, "returned a NoneType, not a module"),
        (nn.LayerNorm, lambda old: nn.Bilinear(2, 2, 2), ValueError, r"cannot be called like layers\.0"),
    ],
)
def test_refusals(kind, make, error, message):
    sch = burnish.create_schedule(Stack(2))
    before = fingerprint(sch.mod)
    with pytest.raises(error, match=message):
        sch.replace_all(kind, make)
    assert fingerprint(sch.mod) == before
    assert sch.history == []
