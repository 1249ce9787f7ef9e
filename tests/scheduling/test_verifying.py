"""`verify` finds what is wrong, says where it comes from, and changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import burnish
from burnish.scheduling import FusedLinears, VerificationError
from tests.scheduling.models import (
    Attention,
    Stack,
    bias_dropout_residual_norm,
    core_attention,
    heads,
    projection,
    sdpa,
)
from tests.scheduling.same import fingerprint


def schedule(model: nn.Module, *, training: bool = False):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return burnish.create_schedule(model.train(training), (torch.randn(2, 5, 32),))


class Wrong(nn.Module):
    """A little too large."""

    def __init__(self, inner: nn.Module, error: float = 1e-3) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args) * (1 + self.error)


def test_every_step_of_the_tutorial_is_right():
    sch = schedule(Attention())
    with sch.verified():
        sch.replace(FusedLinears.with_tail(heads), sch.find(projection))
        sch.replace(sdpa, sch.find(core_attention))
        sch["proj.dense"].decompose()
        sch.fuse(sch.find(bias_dropout_residual_norm), compiler="none", name="Tail")
    assert [step.verified for step in sch.history] == [True] * 4
    assert all(step.numerics[0].startswith("verified: 1 output on 3 inputs in eval mode") for step in sch.history)
    assert "verified: 1 output" in str(sch.history)


def test_gradients_in_train_mode_with_dropout_by_the_names_of_merged_weights():
    sch = schedule(Attention(), training=True)
    sch.replace(FusedLinears.with_tail(heads), sch.find(projection))
    sch["proj.dense"].decompose()
    sch["proj"].checkpoint()
    found = sch.verify()
    assert (found.inputs, found.outputs, found.gradients, found.training) == (3, 1, 10, True)
    assert found.notes == []
    assert 0 < found.error < found.allowed
    torch.manual_seed(7)
    assert sch.verify() == found, "its random numbers are its own"
    assert sch.verify(seed=3) != found


def test_nothing_changes():
    class Counting(nn.Sequential):
        """Batch norm counts what it has seen."""

    sch = schedule(Counting(nn.Linear(32, 32), nn.BatchNorm1d(5), nn.Dropout(0.5)), training=True)
    sch["0"].decompose()
    model = sch.original
    model[0].weight.grad = torch.ones(32, 32)
    before, state = fingerprint(sch.mod), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    sch.verify()
    assert fingerprint(sch.mod) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight.grad, torch.ones(32, 32))
    assert model[0].bias.grad is None


def test_the_step_that_broke_it_is_named_and_the_tree_left_as_it_is():
    sch = schedule(Attention())
    sch["proj.dense"].decompose()
    sch["proj.layer_norm"].replace(Wrong(sch["proj.layer_norm"].mod))
    sch["self_attn"].trace()
    before, steps = fingerprint(sch.mod), list(sch.history)
    with pytest.raises(VerificationError, match=r"^step 2, replace in proj\.layer_norm: output is wrong: the") as error:
        sch.verify()
    assert "from seed 0" in str(error.value)
    assert "\n" not in str(error.value)
    assert (error.value.number, error.value.right) == (2, 1)
    assert fingerprint(sch.mod) == before
    assert sch.history == steps
    sch.undo(2)
    sch.verify()


def test_it_is_looked_for_from_the_last_verified_state_on(monkeypatch):
    from burnish.scheduling.comparing import Reference

    compared = []
    compare = Reference.compare
    monkeypatch.setattr(Reference, "compare", lambda *args: compared.append(1) or compare(*args))
    sch = schedule(Stack(2))
    for name in ("layers.0.proj.dense", "layers.1.proj.dense", "layers.0.self_attn.q_proj"):
        sch[name].decompose()
    sch.verify()
    sch["layers.0.self_attn.k_proj"].decompose()
    sch["layers.1.proj.layer_norm"].replace(Wrong(sch["layers.1.proj.layer_norm"].mod))
    compared.clear()
    with pytest.raises(VerificationError, match=r"^step 5, replace"):
        sch.verify()
    assert len(compared) == 3, "now, after the third step, after the fourth"


def test_what_was_right_in_eval_mode_may_be_wrong_in_train_mode():
    class WrongInTraining(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.001 if self.training else x

    model = Attention()
    model.proj.dropout.p = model.self_attn.dropout.p = 0.0
    sch = schedule(model)
    sch["proj.dropout"].replace(nn.Dropout(0.0))
    sch["self_attn.dropout"].replace(WrongInTraining())
    sch.verify()
    sch["proj.dense"].decompose()
    sch.mod.train()
    with pytest.raises(VerificationError, match=r"^step 2, replace in self_attn\.dropout"):
        sch.verify()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda old: nn.Linear(32, 32), "output is wrong"),
        (lambda old: nn.Linear(32, 16), "the call is wrong: it raises RuntimeError"),
        (lambda old: DetachedLinear(old), r"the gradient of proj\.dense\.weight is wrong"),
        (lambda old: WrongGradient(old), r"the gradient of .* is wrong"),
    ],
)
def test_what_is_wrong(make, said):
    sch = schedule(Attention(), training=True)
    sch.find_all("proj.dense").annotate("kept", 1)
    old = sch["proj.dense"].mod
    sch["proj.dense"].replace(make(old))
    with pytest.raises(VerificationError, match=rf"^step 2, replace in proj\.dense: {said}"):
        sch.verify()


class DetachedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach(), self.bias)


class WrongGradient(DetachedLinear):
    """Right values."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y.detach() + (y - y.detach()) * 1.01


def test_another_structure_of_outputs():
    sch = schedule(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    sch["1"].replace(lambda x: (x.relu(), x))
    with pytest.raises(VerificationError, match=r"step 1, .* it returns \[0\], \[1\] where the model returns"):
        sch.verify()


class ManyDraws(nn.Dropout):
    """Right in eval mode; dropout of another layout in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.transpose(-1, -2).contiguous(), self.p, self.training).transpose(-1, -2)


def test_a_dropout_that_draws_other_numbers_is_compared_in_eval_mode_with_its_gradients():
    sch = schedule(Attention(), training=True)
    sch["proj.dropout"].replace(ManyDraws(0.1))
    found = sch.verify()
    assert found.gradients == 10
    assert found.notes == ["compared in eval mode: its dropout draws other random numbers than the model's"]
    sch["proj.dense"].replace(Wrong(sch["proj.dense"].mod))
    with pytest.raises(VerificationError, match=r"^step 2, replace in proj\.dense"):
        sch.verify()


class Compiled(nn.Dropout):
    """As torch.compile's: it draws as much, but others, and under a dispatch mode as it is written."""

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(torch.ones_like(x), self.p, self.training)
        return x * (dropped if is_in_torch_dispatch_mode() else dropped.flip(0))


def test_a_compiled_dropout_is_compared_in_eval_mode():
    sch = schedule(Attention(), training=True)
    sch["proj.dropout"].replace(Compiled(0.1))
    assert sch.verify().notes == ["compared in eval mode: its dropout draws other random numbers than the model's"]


def test_a_dropout_that_draws_the_same_numbers_and_is_wrong_is_wrong():
    sch = schedule(Attention(), training=True)
    sch["proj.dropout"].replace(nn.Dropout(0.11))
    with pytest.raises(VerificationError, match=r"^step 1, replace in proj\.dropout"):
        sch.verify()


def test_within_verified_the_step_that_failed_is_undone():
    sch = schedule(Attention())
    with sch.verified():
        sch["proj.dense"].decompose()
        shown = str(sch.mod)
        with pytest.raises(VerificationError, match=r"^step 2, replace in proj\.layer_norm"):
            sch["proj.layer_norm"].replace(Wrong(sch["proj.layer_norm"].mod))
    assert str(sch.mod) == shown
    assert [step.primitive for step in sch.history] == ["decompose"]
    sch["proj.layer_norm"].replace(Wrong(sch["proj.layer_norm"].mod))
    assert len(sch.history) == 2, "outside of the block nothing is verified"
    with pytest.raises(VerificationError, match=r"^step 2, replace"), sch.verified():
        pytest.fail("it was wrong before")
    assert len(sch.history) == 2


def test_inputs_that_are_given_are_used_as_they_are():
    class Threshold(nn.Module):
        """Wrong for one value only."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x == 77, x + 1, x)

    model = nn.Sequential(nn.Identity())
    sch = burnish.create_schedule(model)
    sch["0"].replace(Threshold())
    assert sch.verify((torch.randn(3),)).inputs == 1
    with pytest.raises(VerificationError, match=r"^step 1"):
        sch.verify({"input": torch.tensor([1.0, 77.0])})
    with pytest.raises(ValueError, match="verify: give inputs, or give create_schedule example inputs"):
        sch.verify()
    with pytest.raises(ValueError, match="verify: give inputs"), sch.verified():
        pytest.fail("said before anything is done")
    with pytest.raises(TypeError, match="verify: seed must be an integer"):
        sch.verify((torch.randn(3),), seed="a")


def test_parameters_that_are_gone_are_named():
    sch = schedule(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), training=True)
    norm = sch["1"].mod
    sch["1"].replace(lambda x: F.layer_norm(x, (32,), norm.weight.detach(), norm.bias.detach()))
    (note,) = sch.verify().notes
    assert note == "no gradient was compared of 1.weight, 1.bias: no parameter has its values any more"


def test_a_model_that_differs_from_itself():
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.calls += 1
            return x + Counter.calls

    sch = burnish.create_schedule(nn.Sequential(Counter()), (torch.randn(2),))
    sch.annotate("a", 1)
    said = "nothing can be verified: output of the model as it was is another at a second call"
    with pytest.raises(VerificationError, match=said) as error:
        sch.verify()
    assert (error.value.number, error.value.right) == (None, 1)


def test_a_model_that_rounds_badly_is_told():
    class Cancels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e7) - 1e7

    sch = burnish.create_schedule(nn.Sequential(Cancels()), (torch.randn(20),))
    (note,) = sch.verify().notes
    assert note.startswith("little is verified: the model's own rounding errors are large")


def test_a_model_that_was_changed_by_hand():
    sch = schedule(Attention())
    sch.mod.proj.layer_norm.eps = 1.0
    said = "before any step the scheduled model is not the model that was given"
    with pytest.raises(VerificationError, match=said):
        sch.verify()
    sch["proj.dense"].decompose()
    with pytest.raises(VerificationError, match=said):
        sch.verify()


def test_half_precision():
    model = Attention().to(torch.bfloat16).eval()
    sch = burnish.create_schedule(model, (torch.randn(2, 5, 32, dtype=torch.bfloat16),))
    sch.replace(FusedLinears.with_tail(heads), sch.find(projection))
    sch.verify()
    sch["proj.dense"].replace(Wrong(sch["proj.dense"].mod, 0.2))
    with pytest.raises(VerificationError, match=r"^step 2"):
        sch.verify()
