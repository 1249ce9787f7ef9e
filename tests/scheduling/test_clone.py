"""Copies of module trees that share their tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from burnish.scheduling.clone import shallow_copy, structural_clone
from tests.scheduling.models import Attention
from tests.zoo.plain import NanoGPT


def assert_shares_all(clone: nn.Module, model: nn.Module) -> None:
    pairs = list(zip(model.named_modules(), clone.named_modules(), strict=True))
    for (name, old), (other, new) in pairs:
        assert name == other
        assert type(old) is type(new)
        assert old is not new
    tensors = [dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers()) for m in (model, clone)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[1][name] is tensor for name, tensor in tensors[0].items())


def test_modules_are_copies_and_tensors_are_shared():
    model = nn.Sequential(Attention(), nn.BatchNorm1d(4)).eval()
    clone = structural_clone(model)
    assert_shares_all(clone, model)
    clone[0].proj.dense = nn.Identity()
    assert isinstance(model[0].proj.dense, nn.Linear)
    assert not clone.training


def test_what_is_shared_in_the_model_is_shared_in_the_copy():
    block = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": block, "b": block, "c": nn.Linear(4, 4)})
    model["c"].weight = block.weight
    clone = structural_clone(model)
    assert clone["a"] is clone["b"]
    assert clone["c"] is not clone["a"]
    assert clone["c"].weight is clone["a"].weight is block.weight


def test_hooks_come_along():
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[nn.Module] = []
    handle = model[0].register_forward_hook(lambda module, args, result: seen.append(module))
    clone = structural_clone(model)
    clone(torch.randn(1, 4))
    assert seen == [clone[0]]
    handle.remove()
    model(torch.randn(1, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("normed", [weight_norm, pytest.param(old_weight_norm, id="old")])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm(normed):
    model = nn.Sequential(normed(nn.Linear(4, 4)), nn.ReLU())
    clone = structural_clone(model)
    x = torch.randn(2, 4)
    assert torch.equal(clone(x), model(x))
    clone(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_weights_of_a_language_model():
    model = NanoGPT(2, 16, 2, 32, 50, bias=True, sdpa=False)
    clone = structural_clone(model)
    assert clone.lm_head.weight is clone.wte.weight is model.wte.weight
    assert clone.h[0].attn.tril is model.h[0].attn.tril


def test_what_cannot_be_copied_is_one_clear_line():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^model: a Linear that cannot be copied: .*lock"):
        structural_clone(model)


def test_shallow_copy_has_the_same_children_in_its_own_tables():
    model = Attention()
    copied = shallow_copy(model)
    assert copied.proj is model.proj
    del copied.proj
    assert "proj" in model._modules
