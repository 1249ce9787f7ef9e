"""Schedules of Hugging Face's models: outputs, gradients and names stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.pattern import call_module
from burnish.scheduling import FusedLinears, Schedule
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs
from tests.zoo.hugging_face import HF, bert, gpt2, llama_like, text


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    layers: str
    norm: str
    norms: int


FAMILIES = {
    "bert": Family(bert, "encoder.layer.*", "LayerNorm", 5),
    "gpt2": Family(gpt2, "transformer.h.*", "LayerNorm", 5),
    "llama": Family(llama_like, "model.layers.*", "LlamaRMSNorm", 5),
}
pytestmark = [*HF]
of_each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


class Norm(nn.Module):
    """LayerNorm or RMSNorm in another spelling, with the same weights."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight = old.weight
        self.centered = isinstance(old, nn.LayerNorm)
        self.bias = getattr(old, "bias", None)
        self.eps = old.eps if self.centered else old.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


@pytest.fixture
def model(family: Family) -> nn.Module:
    return family.build()


@pytest.fixture
def inputs() -> dict[str, Any]:
    return text()(2, 8, torch.float32)


def norm_class(model: nn.Module, name: str) -> type[nn.Module]:
    return next(type(module) for module in model.modules() if type(module).__name__ == name)


def assert_same(sch: Schedule, inputs: dict[str, Any]) -> None:
    built, model = sch.build(), sch.original
    assert_same_outputs(built, model, **inputs)
    assert_same_names(built, model)
    assert_same_gradients(built, model, **inputs)


@of_each_family
def test_every_norm_another_linears_taken_apart_and_layers_checkpointed(family, model, inputs):
    sch = burnish.create_schedule(model)
    assert sch.replace_all(norm_class(model, family.norm), Norm).matches == family.norms
    layers = sch.find_all(family.layers)
    assert len(layers) == 2
    linears = [path for path, module in layers[0].mod.named_modules() if type(module) is nn.Linear]
    for path in linears:
        sch.find_all(f"{family.layers}.{path}").decompose()
    layers.checkpoint()
    for layer in layers:
        layer.mod.training = True  # its own flag only: what is in it draws no random numbers
    assert_same(sch, inputs)


@of_each_family
def test_a_part_of_each_layer_by_its_pattern(family, model, inputs):
    sch = burnish.create_schedule(model)
    if family is FAMILIES["bert"]:

        def output(x, residual):
            return call_module("LayerNorm", call_module("dropout", call_module("dense", x)) + residual)

        assert len(sch.find(output)) == 4
        assert sch.find_all("encoder.layer.*.attention").fuse(output, "none").matches == 2
        assert len(sch.find(output)) == 4
    elif family is FAMILIES["llama"]:

        def gated(x):
            return call_module("down_proj", F.silu(call_module("gate_proj", x)) * call_module("up_proj", x))

        assert len(sch.find_all("model.layers.*.mlp")) == 2
        assert sch.fuse(gated, "none", name="gated").matches == 2
        assert [name for name, _ in sch["model.layers.0.mlp"].mod.named_children()] == ["act_fn", "gated"]
    else:
        found = sch.find(lambda x: call_module("dropout", call_module("c_proj", x)))
        assert [found[i][0][0] for i in range(2)] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
        sch.fuse(found, "none")
    assert_same(sch, inputs)
    sch.undo()
    assert str(sch.mod) == str(model)


@of_each_family
def test_dropout_draws_the_same_numbers_in_checkpointed_layers(family, model, inputs):
    def gradients(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(5)
        module(**inputs)[0].square().mean().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    model.train()
    expected = gradients(model)
    sch = burnish.create_schedule(model)
    sch.find_all(family.layers).checkpoint()
    assert all(torch.equal(a, b) for a, b in zip(gradients(sch.build()), expected, strict=True))


def test_example_inputs_let_attention_be_traced_and_q_k_v_be_merged(inputs):
    model = bert("eager")
    sch = burnish.create_schedule(model, inputs)

    def projection(x):
        return call_module("query|key|value", x)

    layers = sch.find_all("encoder.layer.*")
    assert layers.replace(FusedLinears, projection).matches == 6
    layers.trace()
    assert len(sch["encoder.layer.0.attention.self"]) == 2
    assert_same(sch, inputs)
    assert_same_outputs(sch.build(), model, **text()(3, 33, torch.float32))
    with pytest.raises(ValueError, match="attention_mask: the module was traced for calls with it and got None"):
        sch.build()(inputs["input_ids"])
    assert str(sch.undo(2)[0]).startswith("replace in encoder.layer.*: 6 matches")
    assert str(sch.mod) == str(model)
