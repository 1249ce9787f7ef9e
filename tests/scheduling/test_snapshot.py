"""The way back to an earlier state of a module tree."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from burnish.scheduling.snapshot import Snapshot
from tests.scheduling.models import Attention
from tests.scheduling.same import fingerprint


def test_everything_is_as_it_was():
    model = Attention()
    model.register_buffer("scale", torch.ones(1), persistent=False)
    before = fingerprint(model)
    snapshot = Snapshot.take(model)
    model.proj.dense = nn.Identity()
    del model.self_attn
    model.proj.layer_norm.weight = nn.Parameter(torch.zeros(32))
    model.proj.layer_norm.eps = 1.0
    model.scale = None
    model.notes = {"new": 1}
    model.proj.forward = lambda x, residual: x
    model.eval()
    model.proj.__class__ = nn.Identity
    snapshot.restore()
    assert fingerprint(model) == before
    assert model.proj.layer_norm.eps == 1e-5
    assert model._non_persistent_buffers_set == {"scale"}


def test_shared_modules_and_tied_weights_stay_so():
    block = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": block, "b": block, "c": nn.Linear(4, 4)})
    model["c"].weight = block.weight
    snapshot = Snapshot.take(model)
    model["b"] = nn.Linear(4, 4)
    model["c"].weight = nn.Parameter(torch.zeros(4, 4))
    snapshot.restore()
    assert model["a"] is model["b"] is block
    assert model["c"].weight is block.weight


def test_a_parametrized_module_becomes_a_plain_one_again():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight
    snapshot = Snapshot.take(model)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    snapshot.restore()
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight


def test_handles_of_hooks_still_work():
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    snapshot = Snapshot.take(model)
    handle_of_a_step = model[0].register_forward_hook(lambda *_: seen.append(2))
    snapshot.restore()
    model(torch.randn(1, 4))
    assert seen == [1]
    handle.remove()
    handle_of_a_step.remove()
    model(torch.randn(1, 4))
    assert seen == [1]
