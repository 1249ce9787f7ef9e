"""The step "quantize": which products read quantized weights, whether they are right, and what is said of it."""

from __future__ import annotations

import copy
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

import burnish
from burnish.capture import Program, capture
from burnish.checks import Checks
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.op import Impl
from burnish.ops import quantized_linear
from burnish.prepare import Prepared, Preparer
from burnish.quantize import Kind, dequantize_rows, quantize_weight
from burnish.quantized_weights import Part, QuantizedWeights, check_kind
from burnish.runtime.module import OptimizedModule
from burnish.tuning import Tuner
from tests.e2e.float64 import outputs_in_float64
from tests.zoo.hugging_face import bert, gpt2, llama_like, needs

pytestmark = pytest.mark.usefixtures("untimed", "small_weights_too")

WIDTH, VOCAB = 128, 320
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
HF = needs("transformers")[0]


@pytest.fixture
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.rewrites.quantize.MIN_ENTRIES", 1 << 10)


def llama(family: str = "Llama", **settings: Any) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 256, "head_dim": 32}
    return llama_like(family, **{**sizes, "num_hidden_layers": 1, **settings})


def weights_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Every matrix that a module multiplies by, its path, and whether it is stored (K, N)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield module, path, not isinstance(module, nn.Linear)


def on_dequantized(model: nn.Module, kind: Kind, head: str = "lm_head") -> nn.Module:
    """A copy of the model whose products read dequantized weights, made module by module."""
    result = copy.deepcopy(model)
    for module, path, transposed in weights_of(result):
        weight = module.weight.detach()  # type: ignore[union-attr, operator]
        its_kind: Kind = "int8" if kind == "int4" and path == head else kind
        new = quantize_weight(weight.t() if transposed else weight, its_kind).dequantize(weight.dtype)
        module.weight = nn.Parameter((new.t() if transposed else new).contiguous())  # an embedding keeps its own
    return result


def leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def assert_right(fast: OptimizedModule, expected: nn.Module, *inputs: Tensor) -> None:
    """`fast` computes what `expected` does, and the original did not have to step in."""
    with torch.no_grad():
        result, eager = leaves(fast(*inputs)), leaves(expected(*inputs))
    assert fast.schedule.served[-1].kept_original is None
    assert_close(result, eager, outputs_in_float64(expected, inputs))


def ops_of(graph: fx.Graph) -> Counter[str]:
    return Counter(op.name for node in graph.nodes if (op := op_of(node.target)) is not None)


def products_of(program: Program) -> Counter[str]:
    return Counter({k: n for k, n in ops_of(program.graph_module.graph).items() if "linear" in k or "gated" in k})


def kinds_of(program: Program) -> Counter[str]:
    nodes = program.graph_module.graph.nodes
    return Counter(node.args[4] for node in nodes if (op := op_of(node.target)) and op.name.startswith("quantized"))


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "Llama": lambda: llama(),
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "Qwen3": lambda: llama("Qwen3"),
    "GPT-2": lambda: gpt2(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1),
    "BERT": lambda: bert(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1),
}
GATED = {"quantized_linear": 4, "quantized_gated_product": 1}  # q, k, v as one; o; down; the head
PLAIN = {"quantized_linear": 5}
PRODUCTS = {"Llama": GATED, "Llama, tied": GATED, "Qwen3": GATED, "GPT-2": PLAIN, "BERT": PLAIN}


@HF
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("Llama", "int4", torch.bfloat16),
        ("Llama, tied", "int8", torch.float32),
        ("Qwen3", "fp8", torch.float32),
        ("GPT-2", "int4", torch.float32),
        ("GPT-2", "int8", torch.float16),
        ("BERT", "int4", torch.float32),
    ],
)
def test_models_compute_with_the_dequantized_weights(name: str, kind: Kind, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    before = copy.deepcopy(model.state_dict())
    fast = burnish.optimize(model, (IDS,), cache="off", quantize=kind)
    program = fast.schedule.program
    assert products_of(program) == PRODUCTS[name]
    head = 1 if kind == "int4" and name != "BERT" else 0
    assert kinds_of(program) == +Counter({kind: 5 - head, "int8": head} if head else {kind: 5})
    (verification,) = fast.schedule.verifications
    assert len(verification.units) > 5
    assert not verification.failures
    assert fast.schedule.served[0].kept_original is None
    expected = on_dequantized(model, kind)
    if dtype is not torch.bfloat16:  # where eager rounds the dequantized weights, the oracle does not
        for ids in (IDS, IDS[:1, :5], IDS[:, :1]):
            assert_right(fast, expected, ids)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@HF
def test_the_difference_is_measured_and_told() -> None:
    model = llama()
    fast = burnish.optimize(model, (IDS,), cache="off", quantize="int4")
    (true,), (quantized,) = (outputs_in_float64(m, (IDS,)) for m in (model, on_dequantized(model, "int4")))
    expected = float((quantized - true).square().mean().sqrt() / true.square().mean().sqrt())
    (found,) = fast.schedule.quantizations
    assert found.difference == pytest.approx(expected, rel=1e-3)  # of the weights' rounding to float32
    head = model.get_parameter("lm_head.weight")
    others = [w for path, w in model.named_parameters() if "proj" in path]
    assert (found.kind, found.products) == ("int4", 5)
    assert found.bytes_before == head.nbytes + sum(w.nbytes for w in others)
    grouped = sum(w.numel() // 2 + w.numel() // 128 * 4 for w in others)
    assert found.bytes_after == head.numel() + 4 * head.shape[0] + grouped

    assert [record.name for record in fast.schedule.history][-4:] == ["fuse", "quantize", "pack", "verify"]
    record = fast.schedule.history[-3]
    line = f"int4: 5 products, 736 KiB -> 117.8 KiB; outputs differ by {found.difference:.2%} (rms)"
    assert (record.matches, record.numerics) == ({"int4": 5}, [line])
    assert fast.report().summary().endswith(f"{line}.")
    before, after = burnish.perplexity_change(fast, IDS)
    assert before == burnish.perplexity(model, IDS) != after
    assert f"; perplexity {before:.4g} -> {after:.4g} (" in str(fast.report()).replace("\n", " ")
    data = fast.report().to_dict()
    assert data["perplexity"] == (before, after)
    assert data["quantized"][0]["bytes_after"] == found.bytes_after


def test_without_verification_the_difference_is_not_known() -> None:
    fast = burnish.optimize(Pair().eval(), (X,), cache="off", quantize="int8", verify=False)
    (found,) = fast.schedule.quantizations
    assert found.difference is None
    assert "differ" not in fast.report().summary()


def test_it_stays_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 1.0, "optimized": 2.0})
    for kind, kept in ((None, "no Impl beat the original"), ("int8", None)):
        fast = burnish.optimize(Pair().eval(), (X,), cache="off", quantize=kind)  # type: ignore[arg-type]
        assert fast.schedule.served[0].kept_original == kept


# --- which products ---------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    """Two products in a row, of one weight if `tied`, with something done to a weight or to the result."""

    def __init__(
        self, tied: bool = False, weight: Callable[[Tensor], Tensor] = lambda w: w, also: str = "", width: int = WIDTH
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(WIDTH, width)
        self.two = self.one if tied else nn.Linear(width, WIDTH)
        self.weight, self.also = weight, also

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.gelu(self.one(x)), self.weight(self.two.weight), self.two.bias)
        return x + self.two.weight.mean() if self.also else x


def prepared(model: nn.Module, kind: Kind | None, *inputs: Tensor) -> Prepared:
    return Preparer(model, Tuner("off"), kind).prepare(capture(model.eval(), inputs or (X,)))


def refusals(found: Prepared) -> list[str]:
    record = next(record for record in found.program.history if record.name == "quantize")
    return [miss.reason for miss in record.near_misses]


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        (Pair(width=72), "int8", "its weight has 72 columns, of int8 16 are stored together"),
        (Pair(width=192), "int4", "its weight has 192 columns, of int4 128 are stored together"),
        (Pair(weight=lambda w: 2 * w), "int8", "its weight is computed"),
        (Pair(also="mean"), "int8", "two.weight is also read by mean"),
    ],
    ids=["columns", "groups", "computed", "also read"],
)
def test_what_stays_float_and_why(model: Pair, kind: Kind, reason: str) -> None:
    found = prepared(model, kind)
    assert products_of(found.program) == {"quantized_linear": 1, "linear": 1}
    assert refusals(found) == [reason]
    assert_right(burnish.optimize(model, (X,), cache="off", quantize=kind), half_dequantized(model, kind), X)


def half_dequantized(model: Pair, kind: Kind) -> Pair:
    """Only the first of its products on a dequantized weight."""
    result = copy.deepcopy(model)
    result.one.weight.data = quantize_weight(model.one.weight.detach(), kind).dequantize()
    return result


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_stay(entry: float) -> None:
    model = Pair()
    with torch.no_grad():
        model.two.weight[1, 2] = entry
    found = prepared(model, "int8")
    assert products_of(found.program) == {"quantized_linear": 1, "linear": 1}
    assert refusals(found) == ["weight has entries that are not finite"]


def test_small_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight: False)
    found = prepared(Pair(width=640), "int8")
    assert products_of(found.program) == {"quantized_linear": 2}
    found = prepared(Pair(), "int8")
    assert products_of(found.program) == {"linear": 2}
    assert refusals(found)[0] == "its weight has 128 x 128 entries, fewer than 65536"
    assert found.quantization is not None
    assert (found.quantization.products, found.quantization.bytes_before) == (0, 0)


def test_a_refusal_holds_for_everyone_who_reads_the_weight() -> None:
    """The captured graph on dequantized weights cannot tell one product of a weight from another."""

    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.one.weight).relu() @ self.two.weight + F.linear(-x, self.two.weight)

    model = Twice().eval()
    found = prepared(model, "int8")
    assert products_of(found.program) == {"quantized_linear": 1, "linear": 1}
    (reason,) = refusals(found)
    assert reason.startswith("two.weight is also read by matmul")
    assert_right(burnish.optimize(model, (X,), cache="off", quantize="int8"), half_dequantized(model, "int8"), X)


def test_a_shared_weight_has_one_copy() -> None:
    found = prepared(Pair(tied=True), "int8")
    assert products_of(found.program) == {"quantized_linear": 2}
    assert [name for name, _ in found.program.graph_module.named_buffers() if "_quantized" in name] == [
        "_quantized_0_weight",
        "_quantized_0_scales",
    ]
    assert found.quantization is not None
    assert found.quantization.bytes_before == 4 * WIDTH**2


def test_bias_activation_and_residual_go_along() -> None:
    model = Pair(width=256)
    (first, second) = (
        quantized_linear.bind(*node.args, **node.kwargs)
        for node in prepared(model, "int8").program.graph_module.graph.nodes
        if node.target is quantized_linear.overload
    )
    assert (first[5].target, first[6], second[5].target, second[6]) == ("one.bias", "gelu", "two.bias", "none")


def test_a_weight_that_was_packed_before(untimed: None) -> None:
    """Parameters that are views, stored (K, N), of what an earlier `optimize` packed."""
    model = Pair(width=256).eval()
    expected = on_dequantized(model, "int8")
    burnish.optimize(model, (X,), cache="off")
    assert not model.one.weight.is_contiguous()
    assert_right(burnish.optimize(model, (X,), cache="off", quantize="int8"), expected, X)


# --- fused Ops without a quantized form -------------------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuses as for CUDA, where norms and rotations are in float products' prologue or epilogue."""
    monkeypatch.setattr("burnish.rewrites.fuse.on_cuda", lambda node: True)
    monkeypatch.setattr(Preparer, "_measure_transposed", lambda self, weight: False)


@HF
@pytest.mark.usefixtures("as_on_cuda")
def test_norms_and_rotations_are_kernels_of_their_own() -> None:
    model = llama()
    as_float = ops_of(prepared(model, None, IDS).program.graph_module.graph)
    assert (as_float["linear_add_rms_norm"], as_float["linear_rope"]) == (1, 1)
    found = prepared(model, "int8", IDS)
    assert products_of(found.program) == GATED
    assert refusals(found) == []
    ops = ops_of(found.program.graph_module.graph)
    assert (ops["rms_norm"], ops["add_rms_norm"], ops["rope_qk"]) == (1, 2, 1)


@HF
@pytest.mark.usefixtures("as_on_cuda")
def test_what_has_no_quantized_form_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a pass of FUSE is new and nobody has said that it is for float products."""
    monkeypatch.setattr("burnish.rewrites.quantize.OF_FLOAT_PRODUCTS", ())
    assert [reason for reason in refusals(prepared(llama(), "int8", IDS)) if "form" in reason] == [
        "linear_rope has no quantized form",
        "linear_add_rms_norm has no quantized form",
    ]


@pytest.mark.usefixtures("as_on_cuda")
def test_what_stays_float_is_fused_all_the_same() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(WIDTH, 72), nn.Linear(72, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.down(F.gelu(self.up(x))))

    found = prepared(Branch(), "int8")
    assert products_of(found.program) == {"quantized_linear": 1, "linear_add_layer_norm": 1}
    assert [record.name for record in found.program.history] == ["capture", "raise", "fuse", "quantize", "fuse", "pack"]


# --- both Programs, and changes ---------------------------------------------------------------------------------------


def copies_of(program: Program) -> set[int]:
    return {b.data_ptr() for name, b in program.graph_module.named_buffers() if name.startswith("_quantized")}


@HF
@pytest.mark.usefixtures("as_on_cuda")
def test_prompt_and_step_share_the_copies_and_follow_changes() -> None:
    model = llama(use_cache=True)
    fast = burnish.optimize(model, cache="off", quantize="int8")

    def generated(by: Any) -> list[list[int]]:
        return by.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()

    assert generated(fast) == generated(on_dequantized(model, "int8"))
    prompt, step = fast.schedule.programs
    assert products_of(prompt) == GATED
    assert products_of(step) == GATED | {"quantized_linear": 3, "quantized_linear_rope_append": 1}
    assert len(copies_of(prompt)) == 10
    assert copies_of(prompt) == copies_of(step)
    assert all(served.kept_original is None for served in fast.schedule.served)
    with torch.no_grad():
        model.lm_head.weight.neg_()  # type: ignore[union-attr, operator]
    assert generated(fast) == generated(on_dequantized(model, "int8"))
    assert all(served.kept_original is None for served in fast.schedule.served)


def in_place(model: Pair) -> None:
    with torch.no_grad():
        model.one.weight[3].mul_(2)


def in_inference_mode(model: Pair) -> None:
    with torch.inference_mode():
        model.one.weight[3].mul_(2)


def loaded(model: Pair) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def replaced(model: Pair) -> None:
    model.one.weight = nn.Parameter(model.one.weight.detach() * 2)


def moved(model: Pair) -> None:
    model.double()
    model.float()
    model.one.weight.data = model.one.weight.detach() * 2


@pytest.mark.parametrize("change", [in_place, in_inference_mode, loaded, replaced, moved])
def test_changed_weights_are_quantized_anew(change: Callable[[Pair], None]) -> None:
    model = Pair().eval()
    fast = burnish.optimize(model, (X,), cache="off", quantize="int8")
    before = on_dequantized(model, "int8")
    assert_right(fast, before, X)
    (old,) = map(copies_of, fast.schedule.programs)
    held = [*fast.schedule.program.graph_module.buffers()]  # so that no new copy gets an old one's memory
    change(model)
    after = on_dequantized(model, "int8")
    assert not torch.equal(after.one.weight, before.one.weight)
    assert_right(fast, after, X)
    (new,) = map(copies_of, fast.schedule.programs)
    assert held
    assert new.isdisjoint(old)
    assert len(fast.serving._preparer.quantized._copies) == 2, "what is of no use any more is gone"  # type: ignore[attr-defined]
    assert_right(fast, after, X[:1])
    assert {p for program in fast.schedule.programs for p in copies_of(program)} == new, "nothing is made again"


def test_gradients_are_those_of_the_float_weights() -> None:
    model = Pair().eval()
    fast = burnish.optimize(model, (X,), cache="off", quantize="int4")
    entries = len(fast.schedule.served)
    for _ in range(3):
        result = fast(X)
        assert_close(result.detach(), model(X).detach(), outputs_in_float64(model, (X,))[0])
        result.sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad  # type: ignore[operator]
                parameter.grad = None
    assert len(fast.schedule.served) == entries + 1, "a step of training makes nothing stale"
    assert_right(fast, on_dequantized(model, "int4"), X)


def test_copies_are_made_once_and_anew_after_a_change() -> None:
    model = Pair()
    weights, parts = QuantizedWeights(model), (Part("one.weight", False), Part("two.weight", True))
    copy_ = weights.of(parts, "int8")
    assert weights.of(parts, "int8") is copy_
    assert weights.of(parts, "int4") is not copy_
    together = torch.cat([model.one.weight.detach(), model.two.weight.detach().t()])
    assert torch.equal(copy_.dequantize(), quantize_weight(together).dequantize())
    in_place(model)
    assert not torch.equal(weights.of(parts, "int8").dequantize(), copy_.dequantize())


def test_weights_whose_changes_cannot_be_seen() -> None:
    with torch.inference_mode():
        model = Pair()
    with pytest.raises(ValueError, match=r"^one\.weight was made in inference mode: a change"):
        QuantizedWeights(model).of((Part("one.weight", False),), "int8")
    model.two.weight = Special(torch.randn(WIDTH, WIDTH))
    with pytest.raises(ValueError, match=r"^two\.weight is a Special, not a plain tensor"):
        QuantizedWeights(model).of((Part("two.weight", False),), "int8")
    with pytest.raises(ValueError, match=r"^lifted is a constant of the graph"):
        QuantizedWeights(model).of((Part("lifted", False),), "int8")


class Special(nn.Parameter):
    """Some library's own kind of parameter."""


def test_first_called_in_inference_mode() -> None:
    model = Pair().eval()
    with torch.inference_mode():
        fast = burnish.optimize(model, (X,), cache="off", quantize="int8")
    assert_right(fast, on_dequantized(model, "int8"), X)


def test_a_remembered_program_is_quantized_too() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).eval()
    burnish.optimize(model, (X,), quantize="int8")
    for kind in ("fp8", "int8"):
        fast = burnish.optimize(model, (X,), quantize=kind)  # type: ignore[arg-type]
        assert fast.schedule.history[0].notes[-1].startswith("remembered from an earlier run")
        assert kinds_of(fast.schedule.program) == {kind: 2}
        assert_right(fast, on_dequantized(model, kind), X)  # type: ignore[arg-type]
    again = burnish.optimize(model, (X,))
    assert again.schedule.history[0].notes[-1].startswith("remembered from an earlier run")
    assert not again.schedule.quantizations
    assert_right(again, model, X)


# --- faults -----------------------------------------------------------------------------------------------------------


def off_by_a_little(*args: Any) -> Tensor:
    return quantized_linear.reference(*args) * 1.0005


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a tenth as wrong as quantization itself."""
    impl = Impl("wrong", off_by_a_little, True, "", lambda *args: [], quantized_linear.bind)
    monkeypatch.setattr(quantized_linear, "impls", {"wrong": impl, **quantized_linear.impls})
    model = Pair().eval()
    fast = burnish.optimize(model, (X,), cache="off", quantize="int8")
    choices = fast.schedule.served[0].choices
    assert [(choice.impl, choice.source) for choice in choices.values()] == [("reference", "verified")] * 2
    assert len(fast.schedule.verifications[0].failures) == 2
    assert_right(fast, on_dequantized(model, "int8"), X)
    unverified = burnish.optimize(model, (X,), cache="off", quantize="int8", verify=False)
    with pytest.raises(AssertionError, match="error is"):
        assert_right(unverified, on_dequantized(model, "int8"), X)


def test_what_is_undone_computes_with_the_dequantized_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the reference does not compute what the oracle does: another activation, say."""
    right = quantized_linear.bind

    def with_relu(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        bound = right(*args, **kwargs)
        return (*bound[:6], "relu" if bound[6] == "gelu" else bound[6], bound[7])

    model = Pair().eval()
    monkeypatch.setattr("burnish.rewrites.quantize.ops.quantized_linear", wrongly_called(with_relu))
    fast = burnish.optimize(model, (X,), cache="off", quantize="int8")
    (note,) = fast.schedule.history[-1].notes
    assert note.startswith("undone: quantized_linear")
    targets = Counter(node.target for node in fast.schedule.program.graph_module.graph.nodes)
    assert targets[dequantize_rows] == 1
    assert products_of(fast.schedule.program)["quantized_linear"] == 1
    assert_right(fast, on_dequantized(model, "int8"), X)
    assert_right(fast, on_dequantized(model, "int8"), X[:1])
    result = fast(X)  # with gradients: of the float weights
    assert fast.schedule.served[-1].kept_original is None
    assert_close(result.detach(), model(X).detach(), outputs_in_float64(model, (X,))[0])


def wrongly_called(bind: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    return lambda *args, **kwargs: quantized_linear.overload(*bind(*args, **kwargs))


@pytest.mark.parametrize("kind", ["int3", "INT8", {"kind": "int8"}, 8, ""])
def test_there_is_no_such_kind(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^quantize=.*: use one of 'int8', 'int4', 'fp8', or None$"):
        burnish.optimize(Pair(), (X,), quantize=kind)


def test_a_gpu_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    model: Any = types.SimpleNamespace(parameters=lambda: iter([on_gpu]))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    check_kind("int8", model)
    with pytest.raises(ValueError, match=r"^quantize='fp8': NVIDIA A100 has no float8"):
        check_kind("fp8", model)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    check_kind("fp8", model)


def test_the_memory_of_weights_that_were_copied_is_not_used_again() -> None:
    """Else other weights could come to lie there, and seem to be the same."""
    model = nn.Linear(256, 256, bias=False)
    weights = QuantizedWeights(model)
    weights.of([Part("weight", False)], "int8")
    memory = StorageWeakRef(model.weight.untyped_storage())
    model.weight.data = torch.randn(256, 256)
    assert not memory.expired()
    weights.forget()
    assert memory.expired()
