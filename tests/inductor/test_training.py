"""`torch.compile(model, backend="burnish")` where gradients flow: through AOTAutograd and Inductor, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from burnish import ops
from burnish.inductor import backend
from burnish.inductor.choices import choose_impls
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.tuning import Tuner
from tests import zoo
from tests.e2e.float64 import gradients, gradients_in_float64, loss
from tests.zoo.case import token_ids
from tests.zoo.plain import NanoGPT

pytestmark = pytest.mark.usefixtures("untimed")
SIZES = ((2, 8), (3, 12), (4, 9))


class Compiled:
    """What Inductor is given: the forward and the backward graphs, and the Impls that their Ops are told."""

    def __init__(self) -> None:
        self.ops: list[Counter[str]] = []
        self.impls: set[tuple[str, str]] = set()

    def __call__(self, graph_module: fx.GraphModule, tuner: Tuner) -> None:
        choose_impls(graph_module, tuner)
        nodes = [(op_of(node.target), node) for node in graph_module.graph.nodes if node.op == "call_function"]
        self.ops.append(Counter(op.name for op, _ in nodes if op is not None))
        self.impls |= {(op.name, node.kwargs["impl"].split()[0]) for op, node in nodes if op and node.kwargs}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    torch._dynamo.reset()
    seen = Compiled()
    monkeypatch.setattr(backend, "choose_impls", seen)
    return seen


class Loss(nn.Module):
    """A GPT in nanoGPT's manner with its loss. `recompute` runs each block under activation checkpointing."""

    def __init__(self, recompute: Callable[..., Any] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.gpt = NanoGPT(2, 32, 2, 16, 50, bias=True, sdpa=True, dropout=dropout)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt.wte(ids) + self.gpt.wpe(torch.arange(ids.shape[1]))
        for block in self.gpt.h:
            x = block(x) if self.recompute is None else self.recompute(block, x)
        logits = self.gpt.lm_head(self.gpt.ln_f(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def check_gradients(run: Callable[..., Any], model: nn.Module, ids: Tensor, autocast: bool = False) -> None:
    found = []
    for each in (run, model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(each(ids=ids))
        value.backward()
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert_close(*found, gradients_in_float64(model, {"ids": ids}))


def test_gradients_at_every_size(compiled: Compiled) -> None:
    model = zoo.seeded(Loss())
    run = torch.compile(model, backend="burnish", fullgraph=True)
    for size in SIZES:
        check_gradients(run, model, token_ids(*size, 50))
    assert len(compiled.ops) == 4, "forward and backward, for the first size and for all others"


@pytest.mark.parametrize("region", [False, True], ids=["around the call", "within the model"])
def test_under_autocast(compiled: Compiled, region: bool) -> None:
    model = zoo.seeded(Loss())

    class Within(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                result: Tensor = model(ids=ids)
            return result

    inner: nn.Module = Within() if region else model
    run = torch.compile(inner, backend="burnish", fullgraph=True)
    found = []
    for each in (run, model):
        model.zero_grad(set_to_none=True)
        ids = token_ids(2, 8, 50)
        with torch.autocast("cpu", torch.bfloat16, enabled=each is model or not region):
            each(ids=ids).backward()
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert_close(*found, gradients_in_float64(model, {"ids": ids}))
    assert compiled.ops[0]["attention_with_logsumexp"] == 2


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = partial(create_selective_checkpoint_contexts, _keep_products)


@pytest.mark.parametrize("context", [{}, {"context_fn": _SELECTIVE}], ids=["all", "selective"])
def test_under_activation_checkpointing(compiled: Compiled, context: dict[str, Any]) -> None:
    model = zoo.seeded(Loss(partial(checkpoint, use_reentrant=False, **context)))
    run = torch.compile(model, backend="burnish", fullgraph=True)
    check_gradients(run, model, token_ids(2, 8, 50))
    forward, backward = compiled.ops
    assert forward["attention_with_logsumexp"] == backward["attention_with_logsumexp"] == 2, "run again"


def test_impls_that_are_asked_for(compiled: Compiled) -> None:
    model = zoo.seeded(Loss())
    options: dict[str, Any] = {"burnish.impls": {"attention": "reference"}, "burnish.cache": "off"}
    run = torch.compile(model, backend="burnish", options=options)
    check_gradients(run, model, token_ids(2, 8, 50))
    parts = {(name, impl) for name, impl in compiled.impls if name.startswith("attention")}
    assert parts == {("attention_with_logsumexp", "reference"), ("attention_backward_packed", "reference")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"burnish.imples": {}}, "there is no burnish.imples; there are burnish.cache, burnish.impls"),
        ({"burnish.impls": {"attention": "flesh"}}, "attention has no Impl 'flesh'; it has"),
        ({"burnish.cache": "on"}, "cache='on': use 'readwrite', 'readonly' or 'off'"),
        ({"burnish.recompute": "no"}, "burnish.recompute is 'no'; it must be True or False"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(nn.Linear(4, 4), backend="burnish", options=options)
    with pytest.raises(Exception, match=says):
        run(torch.randn(2, 4))


def test_what_cannot_be_rewritten_goes_to_inductor(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr("burnish.inductor.trace.make_casts_explicit", refuse)
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    run = torch.compile(model, backend="burnish")
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="goes to Inductor as it is: no"):
        assert torch.equal(run(x), model(x))


def test_a_norm_reads_gradients_as_they_come() -> None:
    """Its forward pass is Inductor's; its backward pass, an Op, needs no cast of a gradient to float32."""
    graphs: list[fx.GraphModule] = []

    def note(graph_module: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
        choose_impls(graph_module, Tuner("off"))
        graphs.append(graph_module)
        return graph_module

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (ops.rms_norm(x, w, 1e-5).bfloat16() @ v).float().sum()

    x, w, v = torch.randn(8, 32), torch.randn(32), torch.randn(32, 16).bfloat16()
    decompositions = select_decomp_table()
    run = aot_function(fn, fw_compiler=note, bw_compiler=note, decompositions=decompositions)
    found = []
    for each in (run, fn):
        inputs = [t.detach().clone().requires_grad_() for t in (x, w, v)]
        found.append(torch.autograd.grad(each(*inputs), inputs))
    exact = [t.detach().double().requires_grad_() for t in (x, w, v)]
    value = (ops.rms_norm(*exact[:2], 1e-5) @ exact[2]).sum()
    assert_close(list(found[0]), list(found[1]), list(torch.autograd.grad(value, exact)))
    forward, backward = ([op_of(n.target) for n in g.graph.nodes if n.op == "call_function"] for g in graphs)
    assert not any(forward)
    assert ops.rms_norm_backward in backward
    (node,) = [n for n in graphs[1].graph.nodes if n.target is ops.rms_norm_backward.overload]
    assert node.args[0].meta["val"].dtype == torch.bfloat16
    assert node.args[1].meta["val"].dtype == torch.float32
    assert node.kwargs["impl"] == "torch"


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_gradients_of_a_table_are_added_in_order(compiled: Compiled, padding_idx: int | None) -> None:
    model = nn.Embedding(7, 8, padding_idx=padding_idx)
    run = torch.compile(model, backend="burnish")
    ids, weights = token_ids(3, 9, 7), torch.randn(3, 9, 8)
    found = []
    for each in (run, model):
        (grad,) = torch.autograd.grad((each(ids) * weights).sum(), model.weight)
        found.append(grad)
    exact = torch.zeros(7, 8).double().index_add(0, ids.flatten(), weights.double().flatten(0, 1))
    if padding_idx is not None:
        exact[padding_idx] = 0
    assert_close(*found, exact)
    assert compiled.ops[-1]["embedding_backward"] == 1


class Residual(nn.Module):
    """Two pre-normed branches, by the Op whose backward pass is one on the CPU too."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList([torch.linspace(0.5, 1.5, 32), torch.linspace(1.5, 0.5, 32)])
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = ids.unsqueeze(-1) * torch.linspace(-1, 1, 32) + self.up.bias
        x = x + self.up(ops.rms_norm(x, self.norms[0], 1e-5))
        return x + self.down(ops.rms_norm(x, self.norms[1], 1e-5))


def test_gradients_over_residual_connections_are_added_in_the_norms(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def note(graph_module: fx.GraphModule, tuner: Tuner) -> None:
        compiled(graph_module, tuner)
        nodes = [n for n in graph_module.graph.nodes if n.target is ops.rms_norm_backward.overload]
        found.extend(len(n.args) > 4 and n.args[4] is not None for n in nodes)

    monkeypatch.setattr(backend, "choose_impls", note)
    model = zoo.seeded(Residual())
    check_gradients(torch.compile(model, backend="burnish", fullgraph=True), model, torch.randn(4, 6))
    assert found == [True, True]
    assert compiled.ops[-1] == Counter(rms_norm_backward=2)


def detached(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w) * (x @ w).sin().detach()


def without_gradients(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = (x @ w).sin()
        with torch.enable_grad():
            z = (x @ w).cos()
    return (x @ w) * y + z


def of_two_results(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        found = torch.topk(x @ w, 3)
    return (x @ w)[:, :3] * found.values + found.indices


def straight_through(x: Tensor, w: Tensor) -> Tensor:
    y = F.gelu(F.linear(x, w))
    return y + (y.round() - y).detach()


def checkpointed(x: Tensor, w: Tensor) -> Tensor:
    result: Tensor = checkpoint(detached, x, w, use_reentrant=False)
    return result


@pytest.mark.parametrize("fn", [detached, without_gradients, of_two_results, straight_through, checkpointed])
@pytest.mark.parametrize("leaves", [(True, True), (False, True)], ids=["of both", "of the weight"])
def test_gradients_stop_where_the_model_stops_them(fn: Callable[..., Tensor], leaves: tuple[bool, bool]) -> None:
    torch._dynamo.reset()
    given = [torch.randn(5, 6).requires_grad_(leaves[0]), torch.randn(6, 6).requires_grad_(leaves[1])]
    wanted = [t for t in given if t.requires_grad]
    found = []
    for run in (torch.compile(fn, backend="burnish"), fn):
        result = run(*given)
        found.append((result, *torch.autograd.grad(result.sum(), wanted)))
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    result = fn(*exact)
    true = (result, *torch.autograd.grad(result.sum(), [t for t in exact if t.requires_grad]))
    assert_close(*found, true)
