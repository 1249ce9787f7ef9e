"""What `optimize` decides: what is undone, which Impl is replaced, and when the original stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import burnish
from burnish import checks, prepare, serving
from burnish.capture import CaptureError, capture
from burnish.checks import Checks
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.op import Impl, ImplUnavailable
from burnish.ops import add_layer_norm, attention, linear
from burnish.rewrites.rewrite import GraphPass, Outcome
from burnish.runtime.module import OptimizedModule
from tests import zoo
from tests.e2e.float64 import outputs_in_float64
from tests.zoo import plain
from tests.zoo.case import hidden

pytestmark = pytest.mark.usefixtures("untimed")

WIDTH, HEADS = 64, 4


@pytest.fixture
def model() -> nn.Module:
    return zoo.seeded(plain.NanoBlock(WIDTH, HEADS, max_seq=64, bias=True, sdpa=True, dropout=0.1))


def x_of(batch: int = 2, seq: int = 16) -> Tensor:
    return hidden(batch, seq, WIDTH, torch.float32)


def assert_right(fast: OptimizedModule, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert_close(fast(x), model(x), outputs_in_float64(model, (x,))[0])


def ops_of(fast: OptimizedModule) -> Counter[str]:
    nodes = fast.schedule.program.graph_module.graph.nodes
    return Counter(op.name for node in nodes if (op := op_of(node.target)) is not None)


def test_a_model_that_was_exported_before(model: nn.Module) -> None:
    exported = torch.export.export(model, (x_of(),), dynamic_shapes=({1: torch.export.Dim.AUTO},)).module()
    fast = burnish.optimize(exported, (x_of(),))
    assert ops_of(fast)["attention"] == 1
    assert_right(fast, model, x_of(seq=33))


def impls_of(served: serving.Served, op: str) -> list[tuple[str, str]]:
    found = ((slot.rpartition("_")[0], choice) for slot, choice in served.choices.items())
    return [(choice.impl, choice.source) for name, choice in found if name == op]


# --- a wrong rewrite ---


def other_gelu(graph_module: fx.GraphModule) -> Outcome:
    """Takes one GELU for the other: off by 1e-3, as a careless pattern would have it."""
    count = 0
    for node in graph_module.graph.nodes:
        if node.target is linear.overload and node.args[3] == "gelu":
            node.args = (*node.args[:3], "gelu_tanh", *node.args[4:])
            count += 1
    return Outcome(count)


@pytest.fixture
def wrong_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "FUSE", [*prepare.FUSE, GraphPass("any gelu", other_gelu)])


@pytest.mark.usefixtures("wrong_rewrite")
def test_a_wrong_rewrite_is_undone_and_told(model: nn.Module) -> None:
    fast = burnish.optimize(model, (x_of(),), cache="off")
    verify = fast.schedule.history[-1]
    assert verify.name == "verify"
    (note,) = verify.notes
    assert note.startswith("undone: linear at linear_default")
    assert any("is allowed" in line for line in verify.numerics)
    assert "undone: linear" in str(fast.report())
    targets = Counter(node.target for node in fast.schedule.program.graph_module.graph.nodes)
    assert targets[torch.ops.aten.gelu.default] == 1
    assert ops_of(fast)["linear"] == 3  # that of the GELU is the captured one again
    assert fast.schedule.served[0].kept_original is None
    for x in (x_of(), x_of(3, 7), x_of(1, 1)):
        assert_right(fast, model, x)
    result = fast(x_of())  # with gradients: from other code
    assert_close(result, model(x_of()), outputs_in_float64(model, (x_of(),))[0])


@pytest.mark.usefixtures("wrong_rewrite")
def test_it_is_verification_that_finds_it(model: nn.Module) -> None:
    fast = burnish.optimize(model, (x_of(),), cache="off", verify=False)
    assert not fast.schedule.verifications
    with pytest.raises(AssertionError, match="error is"):
        assert_right(fast, model, x_of())


@pytest.mark.usefixtures("wrong_rewrite")
def test_with_gradients_the_original_stays_instead(model: nn.Module) -> None:
    """Values inside are verified without gradients only; of a call with gradients the outputs are."""
    fast = burnish.optimize(model, cache="off")
    result = fast(x_of())
    assert torch.equal(result, model(x_of()))
    (served,) = fast.schedule.served
    assert served.kept_original is not None
    assert served.kept_original.startswith("the outputs differ from the original's: ")


# --- a wrong Impl ---


def wrong_impl(monkeypatch: pytest.MonkeyPatch, fn: Callable[..., Any]) -> None:
    """Puts an Impl "wrong" before all others of `linear`."""
    impl = Impl("wrong", fn, True, "", lambda *args: [], linear.bind)
    monkeypatch.setattr(linear, "impls", {"wrong": impl, **linear.impls})


def off_by_a_little(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    return linear.reference(x, weight, bias, activation, residual) * 1.0005


def not_a_number(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    result = linear.reference(x, weight, bias, activation, residual)
    result.view(-1)[-1] = float("nan")
    return result


@pytest.mark.parametrize("fn", [off_by_a_little, not_a_number])
def test_the_reference_takes_a_wrong_impls_place(
    fn: Callable[..., Any], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_impl(monkeypatch, fn)
    fast = burnish.optimize(model, (x_of(),), cache="off")
    assert impls_of(fast.schedule.served[0], "linear") == [("reference", "verified")] * 4
    assert ops_of(fast)["linear"] == 4
    assert any("NaN" in line or "error" in line for line in fast.schedule.history[-1].numerics)
    for x in (x_of(), x_of(3, 7)):
        assert_right(fast, model, x)
    assert impls_of(fast.schedule.served[-1], "linear") == [("reference", "verified")] * 4
    result = fast(x_of())
    assert impls_of(fast.schedule.served[-1], "linear") == [("reference", "verified")] * 4
    assert_close(result, model(x_of()), outputs_in_float64(model, (x_of(),))[0])


class Across(nn.Module):
    """The stream begins transposed, and eager's sums with it are laid out as it is; an Op's are contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        stream = x.transpose(1, 2)
        stream = stream + self.one(stream)
        stream = stream + self.other(self.norms[0](stream))
        out: Tensor = self.norms[1](stream)
        return out


def test_an_impl_is_verified_on_layouts_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(x: Tensor, residual: Tensor, *args: Any) -> Any:
        return add_layer_norm.reference(x, residual.as_strided(x.shape, x.stride()), *args)

    def why_not(x: Tensor, residual: Tensor, *args: Any) -> list[str]:
        return [] if x.is_contiguous() and residual.is_contiguous() else ["not contiguous"]

    impl = Impl("careless", careless, True, "", why_not, add_layer_norm.bind)
    monkeypatch.setattr(add_layer_norm, "impls", {"careless": impl, **add_layer_norm.impls})
    model, x = zoo.seeded(Across()), hidden(2, WIDTH, 7, torch.float32)
    fast = burnish.optimize(model, (x,), cache="off")
    chosen = [impl for impl, _ in impls_of(fast.schedule.served[0], "add_layer_norm")]
    assert chosen[0] != "careless"
    assert chosen[1:] == ["careless"]
    assert not fast.schedule.verifications[0].failures
    assert_right(fast, model, x)


def wrong_for_one_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    result = linear.reference(x, weight, bias, activation, residual)
    return result if x.shape[0] > 1 else 2 * result


def test_sizes_of_one_are_checked_by_their_outputs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export saw no sizes of 1: what is verified at others says nothing about them."""
    wrong_impl(monkeypatch, wrong_for_one_row)
    fast = burnish.optimize(model, (x_of(),), cache="off")
    assert_right(fast, model, x_of(1, 16))
    assert [served.kept_original is None for served in fast.schedule.served] == [True, False]
    assert "the outputs differ" in str(fast.schedule.served[-1].kept_original)
    assert_right(fast, model, x_of(3, 16))
    assert fast.schedule.served[-1].kept_original is None


# --- a wrong capture ---


def causal_forgotten(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            node.args = (*node.args[:5], False)


def test_a_wrong_capture_is_not_used(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        program = capture(*args, **kwargs)
        for module in (program.graph_module, program.captured):
            causal_forgotten(module.graph)
            module.recompile()
        return program

    monkeypatch.setattr(serving, "capture", wrong)
    fast = burnish.optimize(model, (x_of(),), cache="off")
    (served,) = fast.schedule.served
    assert str(served.kept_original).startswith("the captured graph computes something else: the largest error")
    with torch.no_grad():
        assert torch.equal(fast(x_of()), model(x_of()))


def test_a_capture_that_is_wrong_for_sizes_of_one_is_not_used_for_them(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled_for_one(result: Tensor) -> Tensor:
        return 2 * result if result.shape[0] == 1 else result

    def wrong(*args: Any, **kwargs: Any) -> Any:
        program = capture(*args, **kwargs)
        for module in (program.graph_module, program.captured):
            (output,) = module.graph.find_nodes(op="output")
            with module.graph.inserting_before(output):
                (result,) = output.args[0]
                output.args = ((module.graph.call_function(doubled_for_one, (result,)),),)
            module.recompile()
        return program

    monkeypatch.setattr(serving, "capture", wrong)
    fast = burnish.optimize(model, (x_of(),), cache="off")
    assert fast.schedule.served[0].kept_original is None
    assert_right(fast, model, x_of(1, 16))
    assert "the outputs differ" in str(fast.schedule.served[-1].kept_original)


def test_a_misread_mask_is_captured_as_a_tensor_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface = pytest.importorskip("burnish.huggingface")
    pytest.importorskip("transformers", reason="transformers is not installed")
    right = huggingface._Takeover.attention

    def misread(self: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return right(self, module, q, k, v, None, **{**kwargs, "is_causal": False})

    monkeypatch.setattr(huggingface._Takeover, "attention", misread)
    case = zoo.CASES["llama-sdpa-mask"]
    model = case.build()
    inputs = case.inputs(2, 16, torch.float32)
    fast = burnish.optimize(model, (), inputs, cache="off")
    assert not fast.schedule.program.attention_interface
    assert fast.schedule.served[0].kept_original is None
    assert ops_of(fast)["attention"] == 2
    with torch.no_grad():
        assert_close(fast(**inputs).logits, model(**inputs).logits, outputs_in_float64(model, (), inputs)[0])


def test_what_cannot_be_captured_is_tried_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise CaptureError("no way (model.py:3 in forward)")

    monkeypatch.setattr(serving, "capture", fail)
    fast = burnish.optimize(model, cache="off")
    with torch.no_grad():
        for x in (x_of(), x_of(), x_of(3, 9)):
            assert torch.equal(fast(x), model(x))
    assert len(tried) == 1
    assert {served.kept_original for served in fast.schedule.served} == {"no way (model.py:3 in forward)"}


# --- time ---


def test_the_original_stays_where_it_is_faster(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 100.0, "optimized": 103.0})
    fast = burnish.optimize(model, (x_of(),), cache="off")
    (served,) = fast.schedule.served
    assert (served.original_us, served.optimized_us) == (100.0, 103.0)
    assert served.kept_original == "no Impl beat the original"
    with torch.no_grad():
        assert torch.equal(fast(x_of()), model(x_of()))


def test_what_looks_slower_is_timed_again(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = iter([0.0, 150.0, 90.0])  # the first time is of the original alone
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 100.0, "optimized": next(optimized)})
    (served,) = burnish.optimize(model, (x_of(),), cache="off").schedule.served
    assert (served.kept_original, served.optimized_us) == (None, 90.0)


@pytest.mark.parametrize(
    ("transposed", "first_us", "told_us"),
    [
        (False, 300.0, 100.0),  # the machine was busy
        (False, 80.0, 100.0),  # the machine is busy now; what is told of both is of one moment
        (True, 80.0, 95.0),  # weights have another layout now: that of before is timed, too
    ],
)
def test_both_times_are_of_one_moment(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, transposed: bool, first_us: float, told_us: float
) -> None:
    def measured(functions: dict[str, Any], *rest: Any, **options: Any) -> dict[str, float]:
        times = {"original": 100.0 if "optimized" in functions else first_us, "as given": 95.0, "optimized": 70.0}
        return {name: times[name] for name in functions}

    monkeypatch.undo()
    monkeypatch.setattr(checks, "measure", measured)
    monkeypatch.setattr(prepare.Preparer, "_measure_transposed", lambda self, weight: transposed)
    (served,) = burnish.optimize(model, (x_of(),), cache="off").schedule.served
    assert (served.original_us, served.optimized_us) == (told_us, 70.0)


def test_where_no_copy_can_be_had_the_first_time_counts(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([{"original": 80.0}, {"original": 100.0, "optimized": 70.0}])
    monkeypatch.setattr(Checks, "times", lambda self, entry: next(times))
    (served,) = burnish.optimize(model, (x_of(),), cache="off").schedule.served
    assert (served.original_us, served.optimized_us) == (80.0, 70.0)


def test_level_is_not_slower(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 100.0, "optimized": 101.0})
    assert burnish.optimize(model, (x_of(),), cache="off").schedule.served[0].kept_original is None


def test_what_was_asked_for_runs_even_if_slower(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 100.0, "optimized": 300.0})
    fast = burnish.optimize(model, (x_of(),), cache="off", impls={"linear": "reference"})
    assert fast.schedule.served[0].kept_original is None


# --- the user's choice ---


def test_impls_that_are_asked_for_are_used(model: nn.Module) -> None:
    fast = burnish.optimize(model, (x_of(),), cache="off", impls={"linear": "reference", "attention": "reference"})
    assert_right(fast, model, x_of(3, 5))
    fast(x_of())
    for served in fast.schedule.served:
        assert impls_of(served, "linear") == [("reference", "explicit")] * 4
        assert impls_of(served, "attention") == [("reference", "explicit")]


def test_an_impl_that_cannot_raises_with_every_reason(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["head_dim=16 is not a multiple of 32", "the moon is full"]
    impl = Impl("picky", attention.reference, True, "", lambda *args: reasons, attention.bind)
    monkeypatch.setattr(attention, "impls", {**attention.impls, "picky": impl})
    for _ in range(2):
        with pytest.raises(ImplUnavailable) as raised:
            burnish.optimize(model, (x_of(),), cache="off", impls={"attention": "picky"})
        assert all(reason in str(raised.value) for reason in reasons)


# --- what is told, and what is left alone ---


def test_nothing_is_told_before_the_first_call(model: nn.Module) -> None:
    fast = burnish.optimize(model, cache="off")
    assert (fast.serving.history, fast.schedule.served, fast.schedule.programs) == ([], [], [])
    assert [step.name for step in fast.schedule.history] == ["optimize"]
    with pytest.raises(ValueError, match="call the optimized model once, or give optimize"):
        _ = fast.schedule.program


def test_the_history_names_every_step(model: nn.Module) -> None:
    fast = burnish.optimize(model, (x_of(),), cache="off")
    history = fast.schedule.history
    assert [record.name for record in history] == ["capture", "raise", "fuse", "pack", "verify"]
    assert all(record.nodes_before and record.nodes_after for record in history)
    assert history[0].notes == ["free sizes: x[0], x[1]"]
    sizes = [(record.nodes_before, record.nodes_after) for record in history[1:]]
    assert all(after == before for (_, after), (before, _) in pairwise(sizes))
    (units,) = [verification.units for verification in fast.schedule.verifications]
    assert history[-1].numerics[0].startswith(f"{len(units)} of {len(units)} rewritten values")
    fast(x_of(3, 5))
    assert fast.schedule.history == history


def test_random_numbers_are_drawn_as_without_it(model: nn.Module) -> None:
    """Setting up, for the first size or for another, takes none; no two calls get the same ones."""
    model.train()
    fast = burnish.optimize(model, cache="off")
    for x in (x_of(), x_of(3, 5)):
        with torch.no_grad():
            torch.manual_seed(5)
            model(x)
            expected = torch.get_rng_state()
            torch.manual_seed(5)
            first = fast(x)
            assert torch.equal(torch.get_rng_state(), expected)
            assert not torch.equal(fast(x), first)


def test_dropout_is_switched_off_to_verify(model: nn.Module) -> None:
    model.train()
    fast = burnish.optimize(model, (x_of(),), cache="off")
    (verification,) = fast.schedule.verifications
    assert verification.skipped is None
    assert verification.units
    assert not verification.failures


def test_what_is_random_otherwise_is_not_verified_and_says_so() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x * torch.bernoulli(x.sigmoid()))

    fast = burnish.optimize(Noisy(), (torch.randn(2, 16),), cache="off")
    (verification,) = fast.schedule.verifications
    assert "is random" in str(verification.skipped)
    assert any(note.startswith("not verified: ") for note in fast.schedule.history[-1].notes)


def test_optimize_with_measured_times_end_to_end(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stopwatches that all other tests stop."""
    monkeypatch.undo()
    monkeypatch.setattr(checks, "_SLOWER", float("inf"))
    fast = burnish.optimize(model, (x_of(),), cache="off")
    (served,) = fast.schedule.served
    assert served.original_us is not None
    assert served.optimized_us is not None
    assert served.seconds > 0
    assert {choice.source for choice in served.choices.values()} <= {"measured", "only"}
    assert any(len(choice.times_us) > 1 for choice in served.choices.values())
    assert_right(fast, model, x_of())
    assert_right(fast, model, x_of(3, 5))


@pytest.mark.parametrize("autocast", [True, False])
def test_few_numbers_are_judged_by_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    """A loss is float32 by its dtype alone."""
    seen: set[tuple[str, Any]] = set()

    def noting(name: str) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(checks, name)

        def run(*args: Any) -> Any:
            seen.add((name, args[-1]))
            return original(*args)

        return run

    for name in ("check_outputs", "verify"):
        monkeypatch.setattr(checks, name, noting(name))
    model, x = zoo.seeded(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))), torch.randn(4, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        burnish.optimize(model)(x)
    assert seen == {(name, torch.bfloat16 if autocast else None) for name in ("check_outputs", "verify")}
