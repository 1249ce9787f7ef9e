"""Modules that a Schedule can look into with example inputs only: they ask for sizes, or take tensors in `**kwargs`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.numerics import assert_close
from burnish.pattern import call_module
from burnish.scheduling import FusedLinears, load
from burnish.scheduling.sizes import recorded_factories
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs
from tests.zoo.hugging_face import HF, bert, gpt2, llama_like, text


class Branching(nn.Module):
    """Asks for a size, a number of dimensions and a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        q, k = self.q(x), self.k(x)
        if x.shape[1] > 4:
            q = F.relu(q) + k
        if "bias" in kwargs:
            q = q + kwargs["bias"]
        return q * 2 if x.dim() == 3 else q


class Holder(nn.Module):
    """Gives its inputs to the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x, *args, **kwargs) * 1


def relu_plus(x: Tensor, y: Tensor) -> Tensor:
    return F.relu(x) + y


def projection(x: Tensor) -> Tensor:
    return call_module("q|k", x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, scale=0.25, is_causal=False)


def test_a_branch_on_a_size_becomes_a_condition():
    model = Holder(Branching())
    x = torch.randn(2, 5, 8)
    assert burnish.create_schedule(model).find(relu_plus) == []
    sch = burnish.create_schedule(model, {"x": x, "bias": torch.randn(8)})
    assert [[(path, node.name) for path, node in found] for found in sch.find(relu_plus)] == [
        [("inner", "relu"), ("inner", "add")]
    ]
    sch.fuse(relu_plus, "none", name="fused")
    sch["inner"].replace(FusedLinears, projection, name="qk")
    built = sch.build()
    assert [name for name, _ in built.inner.named_children()] == ["fused", "qk"]
    for shape in ((2, 5, 8), (1, 9, 8), (7, 6, 8)):
        assert_same_outputs(built, model, torch.randn(shape), bias=torch.randn(8))
    assert_same_gradients(built, model, x=x, bias=torch.randn(8))
    assert_same_names(built, model)
    with pytest.raises(
        ValueError, match=r"captured for calls with x\.shape\[1\] > 4, which does not hold; give create_sch"
    ):
        built(torch.randn(2, 3, 8), bias=torch.randn(8))
    with pytest.raises(ValueError, match=r"x is torch\.float32 with 3 dimensions, which does not hold"):
        built(torch.randn(1, 5, 5, 8), bias=torch.randn(8))
    with pytest.raises(ValueError, match=r"captured for further arguments \['bias'\] and got \[\]"):
        built(x)
    assert sch.verify().outputs == 1
    sch.undo(2)
    assert str(sch.mod) == str(model)


def test_the_other_branch_for_other_inputs():
    sch = burnish.create_schedule(Holder(Branching()), (torch.randn(2, 3, 8),))
    assert sch.find(relu_plus) == []
    sch["inner"].trace()
    built = sch.build()
    assert_same_outputs(built, sch.original, torch.randn(4, 2, 8))
    with pytest.raises(ValueError, match=r"x\.shape\[1\] <= 4"):
        built(torch.randn(2, 5, 8))


def test_a_size_of_one_in_the_examples_is_no_condition():
    sch = burnish.create_schedule(Holder(Branching()), (torch.randn(1, 5, 8),))
    sch["inner"].trace()
    assert_same_outputs(sch.build(), sch.original, torch.randn(3, 17, 8))


def test_a_size_that_is_needed_as_a_number():
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(x.shape[0], dtype=x.dtype)
            for i in range(x.shape[1]):
                total = total + x[:, i]
            return total * torch.arange(x.shape[0])

    sch = burnish.create_schedule(Holder(Loop()), (torch.randn(2, 3),))
    sch["inner"].trace()
    assert_same_outputs(sch.build(), sch.original, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"x\.shape\[1\] == 3, which does not hold"):
        sch.build()(torch.randn(5, 4))


def test_what_is_traced_may_be_compiled_exported_and_traced_again():
    sch = burnish.create_schedule(Holder(Branching()), (torch.randn(2, 5, 8),))
    sch["inner"].trace()
    built, x = sch.build(), torch.randn(3, 6, 8)
    expected = sch.original(x)
    assert torch.equal(torch.compile(built, backend="eager", fullgraph=True, dynamic=True)(x), expected)
    assert torch.equal(torch.export.export(built, (x,), strict=False).module()(x), expected)
    assert torch.equal(
        burnish.create_schedule(built, (x,)).trace() and burnish.create_schedule(built, (x,)).mod(x), expected
    )


def test_a_slice_of_a_buffer_follows_the_size():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(1, 32, 8))

        def forward(self, x: Tensor) -> Tensor:
            length = x.size(1)
            assert length <= 32
            return x + self.table[:, :length]

    sch = burnish.create_schedule(Holder(Positions()), (torch.randn(2, 5, 8),))
    sch["inner"].trace()
    built = sch.build()
    assert_same_outputs(built, sch.original, torch.randn(3, 11, 8))
    with pytest.raises(ValueError, match=r"x\.shape\[1\] <= 32"):
        built(torch.randn(1, 33, 8))


class Kept:
    """Counts, and keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.cat(self.seen, dim=1)

    @property
    def is_empty(self) -> bool:
        return not self.seen


def test_an_object_is_an_input_and_its_answers_are_conditions():
    class Appending(nn.Module):
        def forward(self, x: Tensor, kept: Kept) -> Tensor:
            if not isinstance(kept, Kept):
                return x
            y = F.relu(x) + 1 if kept.is_empty else x
            return kept.update(y)

    example = Kept()
    sch = burnish.create_schedule(Holder(Appending()), (torch.randn(2, 3, 8), example))
    sch["inner"].fuse(lambda x: F.relu(x) + 1, "none")
    assert example.is_empty
    built, kept, expected = sch.build(), Kept(), Kept()
    x = torch.randn(4, 5, 8)
    assert torch.equal(built(x, kept), sch.original(x, expected))
    assert torch.equal(kept.seen[0], expected.seen[0])
    with pytest.raises(ValueError, match="captured where is_empty is True, and it is False"):
        built(x, kept)


def test_sizes_inside_of_an_object_cannot_be_asked_for():
    class Asking(nn.Module):
        def forward(self, x: Tensor, kept: Kept) -> Tensor:
            return x + 1 if kept.seen[0].shape[1] > 2 else x

    example = Kept()
    example.update(torch.randn(2, 3, 8))
    sch = burnish.create_schedule(Holder(Asking()), (torch.randn(2, 3, 8), example))
    with pytest.raises(ValueError, match=r"Asking.* cannot be traced: it asks for a size in kept, which no condition"):
        sch["inner"].trace()


def test_a_graph_that_is_not_what_the_module_computes_is_refused():
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if isinstance(x, Tensor) else x + 1

    sch = burnish.create_schedule(Holder(Asking()), (torch.randn(2, 3),))
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="Asking cannot be traced: its graph returns something else than the module"):
        sch["inner"].trace()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(sch.history) == 0
    assert not sch.mod.inner._forward_hooks


def test_a_branch_on_values_cannot_be_captured():
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"Values.* cannot be traced: symbolically traced variables cannot be used"):
        burnish.create_schedule(Holder(Values()), (torch.randn(2, 3),))["inner"].trace()


def test_torchs_functions_are_put_back():
    before = torch.arange

    def fail() -> None:
        with recorded_factories(lambda *call: None):
            assert torch.arange is not before
            assert torch.arange(3).tolist() == [0, 1, 2]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.arange is before


# --- Hugging Face -----------------------------------------------------------------------------------------------------

MODELS: dict[str, Any] = {
    "bert": (bert, "encoder.layer.{}.attention.self", "query|key|value"),
    "gpt2": (gpt2, "transformer.h.{}.attn", None),
    "llama": (llama_like, "model.layers.{}.self_attn", "[qkv]_proj"),
}


def inputs_of(name: str, batch: int = 2, seq: int = 8) -> dict[str, Any]:
    cached = {} if name == "bert" else {"use_cache": True}
    return {**text()(batch, seq, torch.float32), **cached}


def assert_same_first(built: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The first output, where another one is a cache."""
    with torch.no_grad():
        result, eager = built(**inputs)[0], model(**inputs)[0]
        assert_close(result, eager, copy.deepcopy(model).double()(**inputs)[0])


@HF[0]
@pytest.mark.parametrize("name", MODELS)
class TestHuggingFace:
    def test_attention_is_found_fused_and_its_projections_merged(self, name, tmp_path):
        build, path, projections = MODELS[name]
        model, inputs = build(), inputs_of(name)
        sch = burnish.create_schedule(model, inputs)
        found = sch.find(attention)
        assert [[parent for parent, _ in one] for one in found] == [[path.format(i)] for i in range(2)]
        sch.fuse(attention, "none", name="core")
        if projections is not None:
            merged = sch.find_all(path.format("*")).replace(FusedLinears, lambda x: call_module(projections, x))
            assert merged.matches == 6
        built = sch.build()
        assert hasattr(built.get_submodule(path.format(1)), "core")
        assert_same_names(built, model)
        for other in (inputs, inputs_of(name, 3, 17)):
            assert_same_first(built, model, other)
        with pytest.raises(ValueError, match="give create_schedule example inputs"):
            built(**inputs_of(name, 2, 1))
        if name == "bert":
            assert_same_gradients(built, model, **inputs)
            assert sch.verify().outputs == 2
            sch.undo()
            sch.save(tmp_path / "schedule.json")
            again = load(tmp_path / "schedule.json", build(), inputs)
            assert_same_first(again.build(), model, inputs)
        sch.undo(len(sch.history))
        assert str(sch.mod) == str(model)

    def test_the_whole_model(self, name):
        build, path, _ = MODELS[name]
        model, inputs = build(), inputs_of(name)
        sch = burnish.create_schedule(model, inputs)
        inner = path.partition(".")[0] if name != "bert" else ""
        layers = sch.find(lambda node: node.op == "call_module" and str(node.target).rpartition(".")[2] in "01")
        assert [parent for parent, _ in layers] == [inner or "encoder"] * 2
        sch.trace()
        if inner:
            sch[inner].trace()
        built = sch.build()
        assert_same_names(built, model)
        for other in (inputs, inputs_of(name, 3, 17)):
            assert_same_first(built, model, other)
            if inner:
                mine, theirs = (made(**other).past_key_values for made in (built, model))
                assert type(mine) is type(theirs)
                assert torch.equal(mine.layers[1].keys, theirs.layers[1].keys)
