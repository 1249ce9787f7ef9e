"""`checkpoint`: the same gradients from fewer kept activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.numerics import assert_close, oracle
from tests.scheduling.models import Attention, Stack
from tests.scheduling.same import assert_same_names, fingerprint


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def kept_bytes(model, x):
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(x)
    del result
    return sum(sizes.values())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack(3).train()


def test_same_gradients_with_dropout_from_less_memory(model):
    x = torch.randn(4, 16, 32)
    expected, before = gradients(model, x), kept_bytes(model, x)
    sch = burnish.create_schedule(model)
    assert sch.find_all("layers.*").checkpoint().matches == 3
    built = sch.build()
    assert all(torch.equal(a, b) for a, b in zip(gradients(built, x), expected, strict=True))
    assert kept_bytes(built, x) < 0.5 * before
    assert_same_names(built, model)
    assert isinstance(built.layers[0], Attention)


def test_nothing_in_eval_and_without_gradients(model, monkeypatch):
    built = burnish.create_schedule(model)
    built.find_all("layers.*").checkpoint()
    built = built.build()

    def forbidden(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr("burnish.scheduling.primitives.checkpoint.checkpoint", forbidden)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        built(x)
    built.eval()
    model.eval()
    assert torch.equal(built(x), model(x))
    with pytest.raises(AssertionError, match="checkpointed"):
        built.train()(x)


def test_matches_are_still_found_and_replaced_inside(model):
    sch = burnish.create_schedule(model.eval())
    sch.find_all("layers.*").checkpoint()
    sch["layers.1.proj.dense"].decompose()
    found = sch.find(lambda x, y: torch.add(x, y))
    assert [parent for occurrence in found for parent, _ in occurrence].count("layers.1.proj.dense") == 1
    sch.find_all("layers.*.self_attn").trace()
    x = torch.randn(2, 5, 32)
    assert_close(sch.build()(x), model(x), oracle(copy.deepcopy(model).double(), x))


def test_refusals(model):
    sch = burnish.create_schedule(model)
    sch["layers.0"].checkpoint()
    before = fingerprint(sch.mod)
    with pytest.raises(ValueError, match=r"checkpoint: layers\.0 is checkpointed already"):
        sch["layers.0"].checkpoint()
    with pytest.raises(ValueError, match="checkpoint: layers has no forward"):
        sch["layers"].checkpoint()
    assert fingerprint(sch.mod) == before
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="the forward of Stack was replaced by another function"):
        burnish.create_schedule(model).checkpoint()


def test_a_copy_recomputes_its_own_forward(model):
    sch = burnish.create_schedule(nn.Sequential(model))
    sch["0"].checkpoint()
    built = sch.build()
    assert built[0].__dict__["forward"].__self__ is built[0]


def test_a_cache_is_refused():
    transformers = pytest.importorskip("transformers", reason="the cache is Hugging Face's")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=16, n_positions=16)
    sch = burnish.create_schedule(transformers.GPT2LMHeadModel(config).train())
    sch.find_all("transformer.h.*").checkpoint()
    built, ids = sch.build(), torch.arange(8)[None]
    built(ids, use_cache=False).logits.sum().backward()
    with pytest.raises(ValueError, match=r"GPT2Block is checkpointed.* use_cache=False"):
        built(ids)
    with torch.no_grad():
        built(ids)
