"""Every model of the zoo: what is found in it, what is made of it, and that it still computes the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

import burnish
from burnish import ops, prepare
from burnish.capture import capture
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.record import StepRecord
from burnish.rewrites import RAISE, apply, fuse
from burnish.runtime.module import OptimizedModule
from tests import zoo
from tests.e2e.float64 import assert_same_outputs, gradients, gradients_in_float64, loss, outputs_in_float64
from tests.zoo.hugging_face import llama_like

pytestmark = pytest.mark.usefixtures("untimed")
aten = torch.ops.aten

# --- what is found and what is made of it -----------------------------------------------------------------------------

# One product for q, k and v is the model's own way: nothing is left to merge.
QKV_IN_ONE = ("gpt2-*", "nanogpt-*", "notebook-*", "sdpa-tutorial-*")

# Sums that a norm follows directly, beyond or below one for each residual sum.
OTHER_SUMS = {
    "whisper-*": (+1, "the decoder's first norm follows the sum of token and position embeddings"),
    "nanogpt-block": (-1, "no norm follows the block's last sum"),
    "notebook-block-pre": (-1, "no norm follows the block's last sum"),
}

# Overloads that an Op stands for, all of which have to be gone.
RAISED = {
    *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
    *(aten.softmax.int, aten._softmax.default, aten.scaled_dot_product_attention.default),
    *(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten.rsqrt.default),
    *(aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.erf.default),
    *(aten.repeat_interleave.self_int, aten.neg.default, aten.masked_fill.Scalar),
}
LEFT = {
    "whisper-*": ({aten.gelu.default: 2}, "the encoder's GELUs follow convolutions"),
    "t5-*": ({aten.neg.default: 1}, "the decoder's relative positions are negated before they are put into buckets"),
}


def of_case(table: dict[str, Any], case: zoo.Case, default: Any) -> Any:
    return next((value for pattern, (value, _) in table.items() if fnmatchcase(case.name, pattern)), default)


def raised_ops(case: zoo.Case) -> Counter[str]:
    """The Ops of the raised graph, which knows no fused ones yet."""
    meant = ("attention", "linear", "layer_norm", "rms_norm", "rope")
    found = Counter({name: count for name, count in case.total().items() if name in meant})
    return found + Counter(rope_tables=1) if found["rope"] else found  # all layers rotate by the same tables


def fused_ops(case: zoo.Case) -> Counter[str]:
    """The Ops of the fused graph, derived from the raised ones."""
    total, fused = case.total(), raised_ops(case)
    sums = total["residual"] + of_case(OTHER_SUMS, case, 0)
    for norm in ("layer_norm", "rms_norm"):
        if total[norm]:
            fused[f"add_{norm}"] = sums
            fused[norm] -= sums
    fused["embedding_layer_norm"] = total["embedding_layer_norm"]
    fused["layer_norm"] -= total["embedding_layer_norm"]
    fused["gated_mlp"] = total["gated_mlp"]
    fused["rope_qk"] = fused.pop("rope", 0) // 2  # every model here rotates queries and keys alike
    fused["linear"] -= 3 * total["gated_mlp"]
    if not any(fnmatchcase(case.name, pattern) for pattern in QKV_IN_ONE):
        fused["linear"] -= sum(stack.layers * merged_away(stack) for stack in case.stacks)
    return +fused


def merged_away(stack: zoo.Stack) -> int:
    """q, k, v of self-attention become one product of three; k, v of cross attention one of two."""
    attentions = stack.ops.get("attention", 0)
    return 2 + (attentions - 1) if attentions else 0


def count_ops(graph: fx.Graph) -> Counter[str]:
    return Counter(op.name for node in graph.nodes if (op := op_of(node.target)) is not None)


def activations(graph: fx.Graph) -> int:
    """Linears with an activation in their epilogue."""
    linears = (node for node in graph.nodes if node.target is ops.linear.overload)
    return sum(ops.linear.bind(*node.args, **node.kwargs)[3] != "none" for node in linears)


def inputs_of(case: zoo.Case, index: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return case.inputs(*case.shapes[index], dtype)


# T5's own code adds a position bias and a mask one after the other. That spelling is not raised: T5 is captured through
# the interface wherever transformers lets it.
@pytest.mark.parametrize(
    "case", zoo.params("bert-*-mask", "gpt2-eager", "llama-*-mask", "whisper-*", "vit-eager", "t5-sdpa")
)
def test_attention_of_transformers_is_found_without_its_interface(case: zoo.Case) -> None:
    program = capture(case.build(), (), inputs_of(case), attention_interface=False)
    apply("raise", RAISE, program.graph_module)
    assert count_ops(program.graph_module.graph) == raised_ops(case)


def test_masks_of_transformers_reach_attention_by_their_meaning() -> None:
    """Padding and causality as such; nothing of the mask that transformers builds is left in the graph."""
    case = zoo.CASES["llama-sdpa-mask"]
    program = capture(case.build(), (), inputs_of(case))
    apply("raise", RAISE, program.graph_module)
    graph = program.graph_module.graph
    calls = [ops.attention.bind(*n.args, **n.kwargs) for n in graph.nodes if n.target is ops.attention.overload]
    for q, k, _, bias, padding, is_causal, window, *_ in calls:
        assert (bias, is_causal, window) == (None, True, None)
        assert padding.meta["val"].dim() == 2
        assert (q.meta["val"].shape[1], k.meta["val"].shape[1]) == (4, 2)
    of_masks = {aten.le.Tensor, aten.index.Tensor, aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.where.self}
    assert of_masks.isdisjoint(node.target for node in graph.nodes)


def test_sliding_windows_reach_attention_by_their_meaning() -> None:
    for name in ("mistral-window", "mistral-window-mask"):
        case = zoo.CASES[name]
        graph = capture(case.build(), (), inputs_of(case)).graph_module.graph
        calls = [ops.attention.bind(*n.args, **n.kwargs) for n in graph.nodes if n.target is ops.attention.overload]
        assert [(call[3], call[5], call[6]) for call in calls] == [(None, True, 8)] * 2


# --- that it still computes the same ----------------------------------------------------------------------------------


def assert_verified(fast: OptimizedModule) -> None:
    (verification,) = fast.schedule.verifications
    assert verification.skipped is None
    assert verification.units
    assert not verification.failures
    assert all(unit.verdict is not None for unit in verification.units)
    covered = {node for unit in verification.units for node in unit.inner}
    graph = fast.schedule.program.graph_module.graph
    reached = {node.name for node in covered}
    assert {node.name for node in graph.nodes if op_of(node.target) is not None} <= reached


@dataclass
class Seen:
    """What the graph held after each step, by the step's name: Ops, linears with an activation, what should be gone."""

    ops: dict[str, Counter[str]] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    left: dict[str, Counter[Any]] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Filled by the first `optimize` of a test."""
    found = Seen()

    def watched(name: str, rewrites: Any, graph_module: fx.GraphModule) -> StepRecord:
        record = apply(name, rewrites, graph_module)
        graph = graph_module.graph
        graph.lint()
        found.ops.setdefault(name, count_ops(graph))
        found.activations.setdefault(name, activations(graph))
        found.left.setdefault(name, Counter(node.target for node in graph.nodes if node.target in RAISED))
        return record

    monkeypatch.setattr(prepare, "apply", watched)
    return found


ALIKE = ("bert-eager-mask", "gpt2-eager-mask", "llama-eager", "vit-eager")


@pytest.mark.parametrize("case", zoo.params(*ALIKE))
def test_eager_attention_of_transformers_is_captured_as_sdpa_is(case: zoo.Case) -> None:
    both = case, zoo.CASES[case.name.replace("eager", "sdpa")]
    eager, sdpa = (str(capture(c.build(), (), inputs_of(c)).graph_module.graph) for c in both)
    assert eager == sdpa


def every_case() -> list[Any]:
    """Those with eager attention are slow tests: their graphs are those of SDPA."""

    def marks(case: zoo.Case) -> list[Any]:
        return [*case.marks, *([pytest.mark.slow] if "-eager" in case.name else [])]

    return [pytest.param(case, id=name, marks=marks(case)) for name, case in zoo.CASES.items()]


@pytest.mark.parametrize("case", every_case())
def test_ops_and_float32_outputs_at_every_shape_from_one_capture(case: zoo.Case, seen: Seen) -> None:
    model = case.build()
    fast = burnish.optimize(model, (), inputs_of(case), cache="off")
    assert seen.ops["raise"] == raised_ops(case)
    assert seen.ops["fuse"] == fused_ops(case)
    assert seen.activations["fuse"] == case.total()["activation"]
    assert seen.left["fuse"] == of_case(LEFT, case, {})
    for index in range(len(case.shapes)):
        assert_same_outputs(fast, model, inputs_of(case, index))
    assert_verified(fast)
    assert len([record for record in fast.schedule.history if record.name == "capture"]) == 1


QWEN2 = replace(zoo.CASES["llama-sdpa"], name="qwen2", build=partial(llama_like, "Qwen2"))  # biases of q, k and v


@pytest.mark.parametrize(
    ("case", "rotates"),
    [
        (zoo.CASES["llama-sdpa-mask"], True),
        (zoo.CASES["llama-mqa"], True),
        (zoo.CASES["mistral-window"], True),
        (QWEN2, True),
        (zoo.CASES["qwen3"], False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_products_rotate_their_heads_as_on_cuda(
    case: zoo.Case, rotates: bool, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten as for CUDA, run here. Qwen3 normalizes queries and keys before it rotates them."""
    monkeypatch.setattr(fuse, "on_cuda", lambda node: True)
    model = case.build()
    fast = burnish.optimize(model, (), inputs_of(case), cache="off")
    wanted = {"linear_rope": case.layers} if rotates else {"rope_qk": case.layers}
    assert {name: n for name, n in seen.ops["fuse"].items() if "rope" in name} == wanted | {"rope_tables": 1}
    for index in range(len(case.shapes)):
        assert_same_outputs(fast, model, inputs_of(case, index))
    assert_verified(fast)


# One of each family; their variants differ in what is captured, not in what is computed.
IN_HALF = ("bert-sdpa-mask", "gpt2-sdpa", "llama-sdpa-mask", "t5-gated-lm", "whisper-sdpa", "vit-sdpa")
IN_HALF += (
    "mistral-window",
    "nanogpt-manual",
    "notebook-mha-padded",
    "notebook-block-post",
    "gated-mlp-gelu",
    "llama-mlp",
)


def in_half() -> list[Any]:
    """Every case in both half precisions; the variants of a family, and float16, are slow tests."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def marks(name: str, short: str, case: Any) -> list[Any]:
        return [*case.marks, *([] if name in IN_HALF and short == "bf16" else [pytest.mark.slow])]

    return [
        pytest.param(case, dtype, id=f"{name}-{short}", marks=marks(name, short, case))
        for name, case in zoo.CASES.items()
        for short, dtype in dtypes.items()
    ]


@pytest.mark.parametrize(("case", "dtype"), in_half())
def test_outputs_in_half_precision(case: zoo.Case, dtype: torch.dtype) -> None:
    model = case.build().to(dtype)
    fast = burnish.optimize(model, (), inputs_of(case, 0, dtype), cache="off")
    for index in (0, 2):
        assert_same_outputs(fast, model, inputs_of(case, index, dtype))
    assert_verified(fast)


def test_what_almost_matched_is_told_with_the_reason() -> None:
    case = zoo.CASES["gpt2-sdpa"]
    history = burnish.optimize(case.build(), (), inputs_of(case), cache="off").schedule.history
    (fuse,) = (record for record in history if record.name == "fuse")
    (miss,) = (miss for miss in fuse.near_misses if miss.rewrite == "add_layer_norm")
    assert "the summands have shapes (input_ids[0], " in miss.reason


# --- in training ------------------------------------------------------------------------------------------------------


IN_TRAINING = (
    "bert-eager-mask",
    "gpt2-sdpa",
    "llama-sdpa",
    "t5-sdpa",
    "nanogpt-manual",
    "notebook-block-pre",
    "slapo-attention",
)


@pytest.mark.parametrize("case", zoo.params(*IN_TRAINING))
def test_outputs_and_gradients_in_training(case: zoo.Case) -> None:
    model = zoo.without_dropout(case.build()).train()
    fast = burnish.optimize(model, cache="off")
    for index in (0, 2):
        inputs = inputs_of(case, index)
        model.zero_grad()
        expected = model(**inputs)
        loss(expected).backward()
        eager = gradients(model)
        model.zero_grad()
        result = fast(**inputs)
        loss(result).backward()
        assert fast.schedule.served[-1].kept_original is None
        assert_close(pytree.tree_leaves(result), pytree.tree_leaves(expected), outputs_in_float64(model, (), inputs))
        true = gradients_in_float64(model, inputs)
        assert eager.keys() == true.keys() == gradients(model).keys()
        assert_close(gradients(model), eager, true)
    assert fast.schedule.served[0].choices


def test_active_dropout_stays_and_its_attention_too() -> None:
    """Dropout on the attention weights has no place in the Op: the model's own attention stays, with that reason."""
    case = zoo.CASES["nanogpt-sdpa"]
    model = case.build().train()
    fast = burnish.optimize(model, (), inputs_of(case), cache="off")
    graph = fast.schedule.program.graph_module.graph
    assert count_ops(graph)["attention"] == 0
    assert count_ops(graph)["linear"] == case.total()["linear"]
    assert sum(node.target is aten.scaled_dot_product_attention.default for node in graph.nodes) == 2
    raised = next(record for record in fast.schedule.history if record.name == "raise")
    (miss,) = (miss for miss in raised.near_misses if "dropout of 0.1" in miss.reason)
    assert len(miss.nodes) == 2
    torch.manual_seed(3)
    first = fast(**inputs_of(case))
    torch.manual_seed(3)
    again = fast(**inputs_of(case))
    other = fast(**inputs_of(case))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    loss(other).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_eval_mode_raises_what_train_mode_could_not() -> None:
    case = zoo.CASES["nanogpt-sdpa"]
    model = case.build().train()
    fast = burnish.optimize(model, (), inputs_of(case), cache="off")
    fast.eval()
    assert_same_outputs(fast, model, inputs_of(case))
    graphs = [program.graph_module.graph for program in fast.schedule.programs]
    assert [count_ops(graph)["attention"] for graph in graphs] == [0, 2]


# --- a part by itself -------------------------------------------------------------------------------------------------


def test_gated_mlp_of_a_llama_with_its_real_inputs() -> None:
    case = zoo.CASES["llama-sdpa"]
    model = case.build()
    given: list[Any] = []
    mlp = model.get_submodule("model.layers.1.mlp")
    with mlp.register_forward_pre_hook(lambda module, args: given.append(args)), torch.no_grad():
        model(**inputs_of(case))
    ((x,),) = given
    fast = burnish.optimize(mlp, (x,), cache="off")
    assert count_ops(fast.schedule.program.graph_module.graph) == Counter(gated_mlp=1)
    for other in (x, x[:1], x[:, :1], torch.cat([x, x], 1)):
        with torch.no_grad():
            assert_close(fast(other), mlp(other), outputs_in_float64(mlp, (other,))[0])
    assert len(fast.schedule.programs) == 1
