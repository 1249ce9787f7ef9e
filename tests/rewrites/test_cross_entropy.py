"""Spellings of cross entropy, and its fusion with the product before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import burnish
from burnish import ops
from burnish.inductor.backend import rewrite
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.record import StepRecord
from tests import zoo
from tests.e2e.float64 import gradients, gradients_in_float64

from .conftest import normal

BF16 = torch.bfloat16
B, T, K, V = 2, 5, 24, 40


def labels(*shape: int, ignored: int = -100) -> Tensor:
    drawn = torch.randint(V, shape, generator=torch.Generator().manual_seed(0))
    drawn.view(-1)[1::4] = ignored
    return drawn


def hugging_face(logits: Tensor, labels: Tensor) -> Tensor:
    """ForCausalLMLoss: the labels shifted, the logits in float32."""
    logits = logits.float()
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), shifted.view(-1), ignore_index=-100)


def hugging_face_before(logits: Tensor, labels: Tensor) -> Tensor:
    """Until 2024 the logits were shifted, which copies them."""
    logits = logits.float()[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(logits.view(-1, V), labels[..., 1:].contiguous().view(-1))


def nanogpt(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)


def swapped(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def spelled_out(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, dim=-1).view(-1, V), labels.view(-1), ignore_index=-1)


def spelled_out_in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.view(-1, V), dim=1, dtype=torch.float32), labels.view(-1))


def gemma(logits: Tensor, labels: Tensor) -> Tensor:
    logits = torch.tanh(logits / 30.0) * 30.0
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "Hugging Face": (hugging_face, {}),
    "Hugging Face before 2025": (hugging_face_before, {}),
    "nanoGPT": (nanogpt, {"ignore_index": -1}),
    "(B, V, T)": (swapped, {}),
    "log_softmax and nll_loss": (spelled_out, {"ignore_index": -1}),
    "log_softmax in float32": (spelled_out_in_float32, {}),
    "softcap": (gemma, {"softcap": 30.0}),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    spelling, options = SPELLINGS[name]
    target = labels(B, T, ignored=options.get("ignore_index", -100))
    found = rewrite(spelling, normal(B, T, V, dtype=dtype), target)
    assert found.ops == Counter(cross_entropy=1)
    (call,) = found.calls
    assert call[2:] == ops.cross_entropy.bind(None, None, **options)[2:]
    assert call[0].meta["val"].dtype == dtype, "the cast to float32 is the Op's"
    assert not any("cross_entropy" in str(target) or "softmax" in str(target) for target in aten_of(found))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_with_the_product_before(name: str, dtype: torch.dtype, rewrite: Callable[..., Any]) -> None:
    spelling, options = SPELLINGS[name]

    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return spelling(F.linear(x, weight, bias), target)

    inputs = normal(B, T, K, dtype=dtype), normal(V, K, dtype=dtype), normal(V, dtype=dtype)
    found = rewrite(loss, *inputs, labels(B, T, ignored=options.get("ignore_index", -100)))
    assert found.ops == Counter(linear_cross_entropy=1)
    (call,) = found.calls
    assert call[4:] == ops.linear_cross_entropy.bind(None, None, None, None, **options)[4:]
    rows = call[0].meta["val"]
    assert rows.shape == (B * (T - 1) if "before" in name else B * T, K)
    assert not any("linear" in str(target) for target in aten_of(found))


def aten_of(found: Any) -> list[Any]:
    return [target for target in found.targets if getattr(target, "namespace", "") == "aten"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_options_are_kept(reduction: str, smoothing: float, rewrite: Callable[..., Any]) -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.t(), target, reduction=reduction, label_smoothing=smoothing, ignore_index=3)

    def by_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            F.linear(x, weight), target, reduction=reduction, label_smoothing=smoothing, ignore_index=3
        )

    for fn, op in ((loss, "cross_entropy"), (by_linear, "linear_cross_entropy")):
        found = rewrite(fn, normal(9, K), normal(V, K), labels(9, ignored=3))
        assert found.ops == Counter([op])
        assert found.calls[0][-5:] == (3, smoothing, 0.0, None, reduction)


def test_a_loss_in_half_precision_stays_one(rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x, t: F.cross_entropy(x, t), normal(9, V, dtype=BF16), labels(9))
    assert found.ops == Counter(cross_entropy=1)
    (result,) = found.graph.output_node().args[0]
    assert result.meta["val"].dtype == BF16


# --- near misses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "target", "reason"),
    [
        (lambda x, t: F.cross_entropy(x, t, weight=torch.ones(V)), labels(9), "it weighs the classes"),
        (lambda x, t: F.cross_entropy(x, t), normal(9, V).softmax(-1), "its targets are probabilities, not classes"),
        (lambda x, t: F.cross_entropy(x.view(3, V, 3), t), labels(3, 3), "are not (T, V)"),
        (lambda x, t: F.cross_entropy(x[0], t[0]), labels(9, ignored=7), "are not (T, V)"),
        (
            lambda x, t: F.cross_entropy(x.view(3, 3, V).transpose(1, 2), t.view(3, 3), reduction="none"),
            labels(9),
            "it gives a loss for each token of (B, T)",
        ),
        (lambda x, t: F.nll_loss(x, t), labels(9), "its input is not a log_softmax's result"),
        (lambda x, t: F.nll_loss(x.log_softmax(0), t), labels(9), "is not over the last dimension"),
    ],
)
def test_what_is_no_cross_entropy_of_ours(
    loss: Callable[..., Tensor], target: Tensor, reason: str, rewrite: Callable[..., Any]
) -> None:
    found = rewrite(loss, normal(9, V), target)
    assert not found.ops
    assert reason in found.reasons


def test_probabilities_that_others_read(rewrite: Callable[..., Any]) -> None:
    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logp = x.log_softmax(-1)
        return F.nll_loss(logp, t), logp.exp()

    found = rewrite(both, normal(9, V), labels(9))
    assert not found.ops
    assert "is also used by exp" in found.reasons


def test_logits_that_the_model_returns_stay(rewrite: Callable[..., Any]) -> None:
    def both(x: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)
        return nanogpt(logits, t), logits

    found = rewrite(both, normal(B, T, K), normal(V, K), labels(B, T, ignored=-1))
    assert found.ops == Counter(linear=1, cross_entropy=1)
    assert "the logits linear_default are also used by output" in found.reasons


def test_a_cap_whose_result_is_returned_is_not_the_losss_alone(rewrite: Callable[..., Any]) -> None:
    def both(x: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tanh(F.linear(x, weight) / 30.0) * 30.0
        return F.cross_entropy(logits.view(-1, V), t.view(-1)), logits

    found = rewrite(both, normal(B, T, K), normal(V, K), labels(B, T))
    assert found.ops == Counter(linear=1, cross_entropy=1)
    assert [call[5] for call in found.calls if len(call) == 7] == [None]


@pytest.mark.parametrize("inner", [lambda x: x / 20.0, lambda x: x * (1 / 20.0)])
def test_another_number_is_no_cap(inner: Callable[[Tensor], Tensor], rewrite: Callable[..., Any]) -> None:
    found = rewrite(lambda x, t: F.cross_entropy(torch.tanh(inner(x)) * 30.0, t), normal(9, V), labels(9))
    assert found.calls[0][5] is None
    found = rewrite(lambda x, t: F.cross_entropy(20.0 * torch.tanh(inner(x)), t), normal(9, V), labels(9))
    assert found.calls[0][5] == 20.0


def test_a_product_with_an_activation_stays(rewrite: Callable[..., Any]) -> None:
    def loss(x: Tensor, weight: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.relu(F.linear(x, weight)), t)

    found = rewrite(loss, normal(9, K), normal(V, K), labels(9))
    assert found.ops == Counter(linear=1, cross_entropy=1)


# --- models -----------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A Hugging Face model's loss alone."""

    def __init__(self, model: nn.Module, **given: Any) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return found


class GPT(nn.Module):
    """nanoGPT's head on its block: the loss alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.model(input_ids)
        return nanogpt(logits, input_ids)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else it warns, and the warning is a graph break
    return Loss(model)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=100
    )
    return Loss(transformers.LlamaForCausalLM(config))


MODELS = {"GPT-2": gpt2, "Llama": llama, "nanoGPT": lambda: GPT(zoo.CASES["nanogpt-manual"].build())}


def compiled(model: nn.Module) -> tuple[Callable[..., Any], list[fx.GraphModule], list[StepRecord]]:
    graphs: list[fx.GraphModule] = []
    records: list[StepRecord] = []

    def rewriting(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewritten, done = rewrite(graph_module, example_inputs)
        graphs.append(rewritten)
        records.extend(done)
        return rewritten

    torch._dynamo.reset()
    return torch.compile(model, backend=rewriting), graphs, records


@pytest.mark.parametrize("name", MODELS)
def test_models_that_return_their_loss(name: str) -> None:
    model = zoo.without_dropout(zoo.seeded(MODELS[name]())).train()
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(1))
    run, graphs, records = compiled(model)
    found = []
    for way in (run, model):
        model.zero_grad()
        loss = way(input_ids=ids)
        loss.backward()
        found.append({n: grad.clone() for n, grad in gradients(model).items()})
    (graph,) = graphs
    counts = Counter(op.name for node in graph.graph.nodes if (op := op_of(node.target)) is not None)
    assert counts["linear_cross_entropy"] == 1
    assert counts["cross_entropy"] == 0
    assert [record.matches.get("cross_entropy", record.matches.get("linear_cross_entropy")) for record in records] == [
        1,
        1,
    ]
    assert_close(*found, gradients_in_float64(model, {"input_ids": ids}))


@pytest.mark.usefixtures("untimed")
def test_optimize_in_training() -> None:
    model = zoo.without_dropout(zoo.seeded(MODELS["nanoGPT"]())).train()
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(1))
    fast = burnish.optimize(model, (ids,))
    loss = fast(ids)
    assert_close(loss.detach(), model(ids).detach(), model.double()(ids).detach())
