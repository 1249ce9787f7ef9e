"""`quantize`: products of stored weights, verified as such, with the names of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.numerics import assert_close, oracle
from burnish.scheduling import VerificationError
from burnish.scheduling.quantized_linear import QuantizedLinear
from tests.scheduling.models import Stack
from tests.scheduling.same import fingerprint
from tests.zoo.case import token_ids
from tests.zoo.hugging_face import gpt2, needs


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack(2).eval()


def schedule(model: nn.Module):
    return burnish.create_schedule(model, (torch.randn(2, 5, 32),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verified_against_the_dequantized_weights_and_the_difference_told(model, dtype):
    model = model.to(dtype)
    sch = burnish.create_schedule(model, (torch.randn(2, 5, 32, dtype=dtype),))
    with sch.verified():
        assert sch.find_all("layers.*.self_attn").quantize("int8").matches == 6
        sch["layers.0.proj.dense"].decompose()
    note = sch.history[-1].numerics[-1]
    said, _, rest = note.partition("differ by up to ")
    assert said == "quantized (int8, 6 weights): by itself this makes outputs "
    assert 0.01 < float(rest.removesuffix("% (rms)")) < 5
    x = torch.randn(2, 5, 32, dtype=dtype)
    assert not torch.equal(sch.build()(x), model(x))
    sch.undo(2)
    assert torch.equal(sch.build()(x), model(x))
    assert sch.verify().notes == []


def test_a_wrong_kernel_is_found_and_quantizing_not_blamed(model, monkeypatch):
    sch = schedule(model)
    sch["layers.1.proj"].quantize()
    sch["layers.0.proj.layer_norm"].replace(nn.LayerNorm(32, eps=0.1))
    with pytest.raises(VerificationError, match=r"^step 2, replace in layers\.0\.proj\.layer_norm"):
        sch.verify()
    sch.undo()
    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: forward(self, x * 1.001))
    with pytest.raises(VerificationError, match=r"^step 1, quantize in layers\.1\.proj: output is wrong"):
        sch.verify()


def test_names_and_checkpoints_are_the_models(model):
    sch = schedule(model)
    sch.quantize()
    built = sch.build()
    assert list(built.state_dict()) == list(model.state_dict())
    other = Stack(2).eval()
    assert str(built.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    again = schedule(other)
    again.quantize()
    x = torch.randn(2, 5, 32)
    assert torch.equal(built(x), again.build()(x))
    loaded = again.build()
    loaded.load_state_dict(built.state_dict())
    assert_close(loaded(x), built(x), dequantized(built, x))
    state = other.state_dict()
    del state["layers.0.proj.dense.weight"]
    state["layers.1.proj.dense.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.proj\.dense\.weight") as error:
        built.load_state_dict(state)
    assert "size mismatch for layers.1.proj.dense.weight: it is (3, 3), in the model (32, 32)" in str(error.value)


@needs("transformers")[0]
def test_weights_that_are_stored_the_other_way_round():
    """GPT-2's, whose head is tied to the embedding; that stays float."""
    model = gpt2(n_layer=1).eval()
    sch = burnish.create_schedule(model, {"input_ids": token_ids(2, 8, 101)})
    with sch.verified():
        assert sch.quantize().matches == 5
    built = sch.build()
    assert list(built.state_dict()) == list(model.state_dict())
    assert built.transformer.h[0].attn.c_attn.weight.shape == model.transformer.h[0].attn.c_attn.weight.shape
    assert built.transformer.wte.weight is model.transformer.wte.weight
    built.load_state_dict(model.state_dict())
    ids = token_ids(1, 5, 101)
    assert torch.equal(built(ids).logits, sch.build()(ids).logits)


def dequantized(built, x):
    """What a model computes in float64 with the weights that a quantized one reads."""
    model = Stack(2).eval()
    model.load_state_dict(built.state_dict())
    return oracle(model.double(), x)


def test_optimize_keeps_what_is_quantized(model, untimed):
    x = torch.randn(2, 5, 32)
    sch = schedule(model)
    sch.quantize()
    built = sch.build()
    fast = burnish.optimize(built, (x,), cache="off")
    with torch.no_grad():
        assert_close(fast(x), built(x), dequantized(built, x))
    targets = [str(node.target) for node in fast.schedule.program.graph_module.graph.nodes]
    assert sum("quantized_linear" in target for target in targets) == 8


def test_refusals(model):
    sch = schedule(model)
    before = fingerprint(sch.mod)
    for refused, said in (
        (lambda: sch.quantize("int3"), "quantize='int3': use one of 'int8', 'int4', 'fp8'"),
        (lambda: sch["layers.0.proj.layer_norm"].quantize(), r"quantize: layers\.0\.proj\.layer_norm has no Linear"),
        (lambda: sch.quantize("int4"), r"no Linear of Stack can be quantized: layers\.0\.self_attn\.q_proj: weight ha"),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    assert fingerprint(sch.mod) == before
    assert sch.history == []
    with pytest.raises(ValueError, match="quantize: Stack is in train mode"):
        schedule(model.train()).quantize()
