"""`replace`: whole modules, one match, several parallel ones, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import burnish
from burnish.pattern import call_module
from burnish.scheduling import FusedLinears
from tests.scheduling.models import (
    Attention,
    LeNet,
    SelfAttention,
    Stack,
    core_attention,
    heads,
    projection,
    sdpa,
)
from tests.scheduling.same import assert_same_gradients, assert_same_names, assert_same_outputs, fingerprint
from tests.zoo.plain import SlapoAttention


class FusedLinearReLU(nn.Module):
    """Takes over a Linear's weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def from_modules(cls, linear: nn.Module, relu: nn.Module | None = None) -> FusedLinearReLU:
        return cls(linear)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.linear(hidden))


def linear_relu(x):
    return F.relu(call_module(r"fc\d", x))


def refused(sch, message, *args, error=ValueError, **kwargs):
    before, steps = fingerprint(sch.mod), len(sch.history)
    with pytest.raises(error, match=message) as caught:
        sch.replace(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert fingerprint(sch.mod) == before
    assert len(sch.history) == steps


# --- whole modules ----------------------------------------------------------------------------------------------------


def test_a_whole_module_by_another_by_a_class_and_by_a_function():
    model = LeNet().eval()
    sch = burnish.create_schedule(model)
    new = nn.Linear(12, 3)
    sch["fc3"].replace(new)
    sch["relu1"].replace(F.relu)
    sch["relu2"].replace(torch.relu)
    sch["fc1"].replace(nn.Sequential(model.fc1, nn.Identity()))
    assert sch.mod.fc3.weight is new.weight
    assert sch.mod.fc3 is not new
    assert not sch.mod.fc3.training
    assert new.training
    expected = F.linear(model.relu2(model.fc2(model.relu1(model.fc1(torch.ones(2, 64))))), new.weight, new.bias)
    lenet = sch.build()
    assert torch.equal(lenet.fc3(lenet.relu2(lenet.fc2(lenet.relu1(lenet.fc1(torch.ones(2, 64)))))), expected)


def test_the_whole_model():
    sch = burnish.create_schedule(Attention())
    sch.replace(nn.Identity())
    assert type(sch.build()) is nn.Identity
    sch.undo()
    assert type(sch.mod) is Attention


def test_a_module_in_two_places_is_replaced_in_both():
    block = nn.Linear(4, 4)
    sch = burnish.create_schedule(nn.Sequential(block, nn.ReLU(), block))
    sch["0"].replace(nn.Linear(4, 4))
    assert sch.mod[0] is sch.mod[2]


def test_a_class_takes_over_the_weights():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    sch = burnish.create_schedule(model)
    sch["0"].replace(FusedLinearReLU)
    built = sch.build()
    assert_same_names(built, model)
    assert torch.equal(built(torch.ones(1, 4)), F.relu(model(torch.ones(1, 4))))


# --- one match --------------------------------------------------------------------------------------------------------


def test_each_match_by_a_module_with_its_own_weights():
    model = LeNet().eval()
    sch = burnish.create_schedule(model)
    step = sch.replace(FusedLinearReLU, sch.find(linear_relu))
    assert step.matches == 2
    assert [name for name, _ in sch.mod.named_children()] == ["conv", "fc3", "FusedLinearReLU_0", "FusedLinearReLU_1"]
    built = sch.build()
    images = torch.randn(2, 1, 8, 8)
    assert_same_outputs(built, model, images)
    assert_same_names(built, model)
    assert_same_gradients(built, model, x=images)


def test_a_function_becomes_part_of_the_graph_and_reuses_the_matchs_module():
    model = LeNet().eval()
    sch = burnish.create_schedule(model)

    def clamped(hidden):
        return torch.clamp(call_module(r"fc\d", hidden), min=0)

    sch.replace(clamped, sch.find(linear_relu))
    assert sch.mod.code.count("torch.clamp(") == 2
    assert [name for name, _ in sch.mod.named_children()] == ["conv", "fc1", "fc2", "fc3"]
    assert_same_outputs(sch.build(), model, torch.randn(2, 1, 8, 8))
    assert_same_names(sch.build(), model)


def test_a_match_that_crosses_modules_changes_no_others():
    model = nn.Sequential(Attention(), Attention()).eval()
    sch = burnish.create_schedule(model)

    def attended(probabilities, value):
        return torch.matmul(probabilities, value).permute(0, 2, 1, 3).flatten(2)

    found = sch.find(lambda x: call_module(r"1\.proj\.dense", x))
    assert [parent for parent, _ in found[0]] == ["1.proj"]
    sch.replace(attended, sch["0"].find(attended))
    assert type(sch.mod[1].self_attn).__name__ == "SelfAttention"
    assert type(sch.mod[1].self_attn) is SelfAttention
    assert not isinstance(sch.mod, torch.fx.GraphModule)
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))


def test_a_node_that_a_predicate_found():
    model = Attention().eval()
    sch = burnish.create_schedule(model)
    found = sch.find(lambda node: getattr(node.target, "__name__", "") == "softmax")
    calls: list[int] = []

    def counted(x, dim, **_):
        calls.append(dim)
        return torch.softmax(x, dim)

    sch.replace(counted, found[0])
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert set(calls) == {-1}


def test_a_module_is_called_by_name_or_in_order():
    class Difference(nn.Module):
        def forward(self, second: Tensor, first: Tensor) -> Tensor:
            return first - second

    class Named(nn.Module):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return x - y

    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.sub(a, b) * 2

    inputs = torch.tensor(5.0), torch.tensor(3.0)
    for new, expected in ((Difference(), -4.0), (Named(), 4.0)):
        sch = burnish.create_schedule(Model())
        sch.replace(new, sch.find(lambda x, y: torch.sub(x, y)))
        assert sch.build()(*inputs) == expected


# --- parallel matches -------------------------------------------------------------------------------------------------


def test_q_k_v_by_one_module():
    model = SelfAttention().eval()
    sch = burnish.create_schedule(model)
    assert sch.replace(FusedLinears.with_tail(heads), sch.find(projection), name="qkv").matches == 3
    assert [name for name, _ in sch.mod.named_children()] == ["dropout", "qkv"]
    assert sch.mod.code.count("self.qkv(") == 1
    assert "view" not in sch.mod.code
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)
    assert_same_gradients(sch.build(), model, x=torch.randn(2, 5, 32))


def test_modules_found_by_name_are_parallel():
    model = nn.Sequential(SelfAttention()).eval()
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears, sch.find(r"[qkv]_proj"))
    assert sch.mod[0].code.count(".view(") == 3
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)


def test_users_own_fused_module():
    class FusedQKV(nn.Module):
        @classmethod
        def from_modules(cls, *linears: nn.Linear) -> FusedQKV:
            fused = cls()
            fused.qkv = FusedLinears(*linears)
            return fused

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(heads, self.qkv(hidden_states)))

    model = Attention().eval()
    sch = burnish.create_schedule(model)
    sch.replace(FusedQKV, sch.find(projection))
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)


def test_parallel_matches_by_a_function():
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) - torch.sin(x) * 2

    model = Both()
    sch = burnish.create_schedule(model)

    def twice(x):
        result = torch.sin(x)
        return result, result

    sch.replace(twice, sch.find(lambda x: torch.sin(x)))
    assert sch.mod.code.count("_twice(") == 1
    assert_same_outputs(sch.build(), model, torch.randn(3))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a9_an_intermediate_that_is_used_elsewhere():
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(x)
            return F.relu(hidden) * hidden

    sch = burnish.create_schedule(Used())
    assert sch.find(linear_relu) == []
    refused(
        sch, "nothing in Used matches; nearest miss: .*fc1: used outside the match by mul", FusedLinearReLU, linear_relu
    )


def test_a9_an_intermediate_that_only_the_module_itself_returns():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.fc1(x)
            return F.relu(hidden), hidden

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    sch = burnish.create_schedule(Outer())
    found = sch.find(linear_relu)
    assert len(found) == 1
    refused(sch, "match: fc1 is used outside the match by the module's result", FusedLinearReLU, found)


def test_a12_wrong_arguments():
    sch = burnish.create_schedule(LeNet())
    found = sch.find(linear_relu)
    refused(sch, r"match: its inputs \(x\) do not fit Bilinear", nn.Bilinear(16, 16, 16), found[0])
    refused(sch, r"replace: Bilinear\(.* cannot be called like fc1", nn.Bilinear(4, 4, 4), sch.find("fc1"))

    def added(x, y):
        return x + y

    refused(sch, r"do not fit added\(x, y\): missing a required argument: 'y'", added, found)


@pytest.mark.parametrize(
    ("new", "match", "error", "message"),
    [
        (nn.Linear, None, ValueError, "Linear is a class without from_modules; give an instance"),
        (3, None, TypeError, "new must be a module or a function, got int"),
        (nn.ReLU(), [], ValueError, "match is empty"),
        (nn.ReLU(), 3, TypeError, "match must be what find.. returns"),
        (nn.ReLU(), [3], TypeError, "match must be what find.. returns"),
        (nn.ReLU(), "fc9", ValueError, "nothing in LeNet matches"),
    ],
)
def test_what_is_no_replacement_or_match(new, match, error, message):
    refused(burnish.create_schedule(LeNet()), message, new, match, error=error)


def test_a_match_in_another_part():
    sch = burnish.create_schedule(nn.ModuleDict({"a": LeNet(), "b": LeNet()}))
    before = fingerprint(sch.mod)
    with pytest.raises(ValueError, match="replace: the match is in b, not in a"):
        sch["a"].replace(FusedLinearReLU, sch["b"].find(linear_relu))
    with pytest.raises(ValueError, match=r"replace: the match is in a, not in b"):
        sch.find_all("*").replace(FusedLinearReLU, sch["a"].find(linear_relu))
    assert fingerprint(sch.mod) == before


def test_why_nothing_is_found_where_modules_cannot_be_traced():
    model = SlapoAttention(32, 4)
    sch = burnish.create_schedule(model)
    refused(
        sch, r"self_attn \(SlapoSelfAttention\) cannot be traced: .*; example inputs .* may help", sdpa, core_attention
    )


def test_names_that_cannot_be():
    sch = burnish.create_schedule(LeNet())
    refused(sch, "name must be a Python name without dots, got 'a.b'", FusedLinearReLU, linear_relu, name="a.b")


def test_one_module_with_weights_for_several_calls():
    sch = burnish.create_schedule(LeNet())
    refused(sch, "2 calls would share the weights of one Linear", nn.Linear(16, 16), linear_relu)


def test_a_match_that_was_found_before_a_change():
    sch = burnish.create_schedule(LeNet())
    found = sch.find(linear_relu)
    sch.trace()
    refused(sch, "it was found before the model was changed or moved; find it again", FusedLinearReLU, found)


def test_weights_that_are_used_elsewhere_are_not_merged():
    model = Attention()
    model.proj.dense.weight = model.self_attn.k_proj.weight
    sch = burnish.create_schedule(model)
    refused(sch, "proj.dense.weight is used elsewhere too", FusedLinears.with_tail(heads), projection)


def test_hooks_would_be_lost():
    model = LeNet()
    model.fc3.register_forward_hook(lambda *_: None)
    sch = burnish.create_schedule(model)
    refused(sch["fc3"], "fc3 has hooks or is checkpointed, which would be lost", nn.Linear(12, 3))


def test_what_cannot_be_traced():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)
            self.fc2 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc1(x) if x.sum() > 0 else self.fc2(x)

    sch = burnish.create_schedule(nn.Sequential(Branching()))
    refused(sch, r"0 \(Branching\) cannot be traced: .*control flow", FusedLinears, r"fc\d")


def test_a_replacement_that_fails_by_itself():
    def failing(x):
        raise RuntimeError("no such kernel")

    refused(burnish.create_schedule(LeNet()), "no such kernel", failing, linear_relu, error=RuntimeError)


def test_shared_layers_are_rewritten_together():
    layer = Attention()
    model = Stack(0)
    model.layers.extend([layer, layer])
    model.eval()
    sch = burnish.create_schedule(model)
    assert sch.replace(FusedLinears.with_tail(heads), projection).matches == 3
    assert sch.mod.layers[0] is sch.mod.layers[1]
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 32))
    assert_same_names(sch.build(), model)


def test_a_value_that_changes_between_parallel_matches():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.sin(x)
            x.add_(1)
            return first * torch.sin(x)

    def twice(x):
        return torch.sin(x), torch.sin(x)

    refused(
        burnish.create_schedule(InPlace()),
        "add_, between the matches, changes a value in place",
        twice,
        lambda x: torch.sin(x),
    )


def test_one_value_that_is_two_arguments_of_the_module():
    class Inner(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.sin(a) + torch.cos(b)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x)

    sch = burnish.create_schedule(Outer())
    found = sch.find(lambda x: torch.sin(x) + torch.cos(x))
    assert len(found) == 1
    refused(sch, "cannot be rewritten in inner: x is two values there, a and b", lambda x: x * 2, found)


def test_matches_with_nodes_in_common():
    sch = burnish.create_schedule(LeNet())
    found = [*sch.find(linear_relu), *sch.find(lambda x: call_module("fc1", x))]
    refused(sch, "two of the matches have nodes in common", FusedLinearReLU, found)


def test_a_function_reads_sizes_and_not_those_of_the_example():
    model = Attention().eval()
    sch = burnish.create_schedule(model, (torch.randn(2, 5, 32),))

    def merged(x):
        batch, _, seq, _ = (x.shape[i] for i in range(4))
        return x.permute(0, 2, 1, 3).reshape(batch, seq, 32)

    sch.replace(merged, lambda x: x.permute(0, 2, 1, 3).flatten(2))
    for shape in ((2, 5, 32), (3, 7, 32)):
        assert_same_outputs(sch.build(), model, torch.randn(shape))


class SinCos(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(torch.cos(x))


def test_back_to_back_matches_by_modules_and_functions():
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(torch.sin(torch.cos(x))))

    for new in (SinCos(), lambda x: torch.sin(torch.cos(x) * 1)):
        sch = burnish.create_schedule(Chain())
        assert sch.replace(new, lambda x: torch.sin(torch.cos(x))).matches == 2
        assert_same_outputs(sch.build(), Chain(), torch.randn(3))


def test_a_pattern_with_two_results():
    class Gate(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total = x + y
            return torch.sigmoid(total) * total

    class Fused(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + y, torch.sigmoid(x + y)

    def pattern(x, y):
        total = x + y
        return total, torch.sigmoid(total)

    inputs = torch.randn(3), torch.randn(3)
    for new in (Fused(), lambda x, y: Fused().forward(x, y)):
        sch = burnish.create_schedule(Gate())
        assert sch.replace(new, pattern).matches == 1
        assert_same_outputs(sch.build(), Gate(), *inputs)


def test_replaced_in_train_mode_the_rest_keeps_its_modes():
    model = Attention().train()
    model.proj.dropout.eval()
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears.with_tail(heads), projection)
    sch["proj.dense"].decompose()
    sch["proj"].fuse(lambda x, y: call_module("dropout", x) + y, "none")
    modes = {path: module.training for path, module in sch.mod.named_modules()}
    assert modes["self_attn"]
    assert modes["self_attn.FusedLinears_0"]
    assert modes["proj.dense"]
    assert not modes["proj.Fused_0.body.dropout"]


class ScaledBySize(nn.Module):
    """An element of a shape (head_dim) is part of what is replaced behind merged projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)


def test_elements_are_told_by_what_they_are_of():
    model = nn.Sequential(ScaledBySize()).eval()
    sch = burnish.create_schedule(model)
    sch.replace(FusedLinears, lambda x: call_module("q|k", x))

    def weights(q, k):
        return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)

    assert sch.replace(lambda q, k: (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1), weights).matches == 1
    assert_same_outputs(sch.build(), model, torch.randn(2, 5, 8))
