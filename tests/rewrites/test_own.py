"""The user's own rewrites: they run first, are verified, undone and told of like the others, and change no capture."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish import program_cache
from burnish.numerics import assert_close
from burnish.record import NearMiss, StepRecord
from burnish.report import sentences
from burnish.runtime.module import OptimizedModule
from tests.e2e.float64 import outputs_in_float64

from .conftest import normal

pytestmark = pytest.mark.usefixtures("untimed")

WIDTH, HEADS = 16, 2
aten = torch.ops.aten


class Attention(nn.Module):
    """Heads in third place, and einsums: no spelling that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)) for linear in (self.query, self.key, self.value))
        weights = torch.softmax(torch.einsum("bfnh,btnh->bnft", q, k) * 0.25, dim=-1)
        return torch.einsum("bnft,btnh->bfnh", weights, v).flatten(-2)


def pattern(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.softmax(torch.einsum("bfnh,btnh->bnft", q, k) * scale, dim=-1)
    return torch.einsum("bnft,btnh->bfnh", weights, v)


def pattern_over_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.softmax(torch.einsum("bfnh,btnh->bnft", q, k) * scale, dim=-2)
    return torch.einsum("bnft,btnh->bfnh", weights, v)


def replacement(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return burnish.ops.attention(q, k, v, scale=scale).transpose(1, 2)


def forgetful(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return burnish.ops.attention(q, k, v).transpose(1, 2)


def examples(dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (torch.randn(2, 3, HEADS, 8, dtype=dtype) for _ in range(3))
    return q, k, v, 0.5


KNOWN = burnish.Rewrite("attention: einsum", pattern, replacement, examples)
X = normal(2, 5, WIDTH)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


def step(fast: OptimizedModule, name: str) -> StepRecord:
    return next(record for record in fast.schedule.history if record.name == name)


def targets(fast: OptimizedModule) -> list[Any]:
    return [node.target for node in fast.schedule.program.graph_module.graph.nodes if node.op != "get_attr"]


def assert_right(fast: OptimizedModule, model: nn.Module, x: Tensor) -> None:
    assert_close(fast(x), model(x), outputs_in_float64(model, (x,))[0])


def test_it_runs_before_the_others_and_is_verified(model: nn.Module) -> None:
    fast = burnish.optimize(model, (X,), rewrites=[KNOWN], cache="off")
    assert [record.name for record in fast.schedule.history[:3]] == ["capture", "rewrite", "raise"]
    assert step(fast, "rewrite").matches == {"attention: einsum": 1}
    assert torch.ops.burnish.attention.default in targets(fast)
    assert aten.transpose.int in targets(fast), "not the method: rewrites that follow know operators"
    (verification,) = fast.schedule.verifications
    assert ("attention",) in [tuple(unit.ops) for unit in verification.units]
    assert not verification.failures
    assert "1 x attention: einsum" in str(fast.report())
    with torch.no_grad():
        assert_right(fast, model, X)
        assert_right(fast, model, normal(3, 7, WIDTH))
    assert_right(fast, model, X)  # with gradients: from other code


def test_a_wrong_one_is_undone(model: nn.Module) -> None:
    wrong = burnish.Rewrite("attention: forgetful", pattern, forgetful, examples)
    fast = burnish.optimize(model, (X,), rewrites=[wrong], cache="off")
    assert step(fast, "rewrite").matches == {"attention: forgetful": 1}
    (note,) = step(fast, "verify").notes
    assert note.startswith("undone: attention at ")
    assert torch.ops.burnish.attention.default not in targets(fast)
    with torch.no_grad():
        assert_right(fast, model, X)


def test_what_almost_matches_says_why(model: nn.Module) -> None:
    almost = burnish.Rewrite("attention: over queries", pattern_over_queries, replacement, examples)
    fast = burnish.optimize(model, (X,), rewrites=[almost], cache="off")
    reason = "dim is -1 where the pattern has -2"
    assert step(fast, "rewrite").near_misses == [NearMiss("attention: over queries", reason, ("softmax",))]
    assert reason in str(fast.report())
    refused = burnish.Rewrite("attention: refused", pattern, replacement, examples, guard=lambda match: "not today")
    fast = burnish.optimize(model, (X,), rewrites=[refused], cache="off")
    assert [miss.reason for miss in step(fast, "rewrite").near_misses] == ["not today"]


def test_it_is_explained_with_what_it_saves(model: nn.Module) -> None:
    found = burnish.explain(model, (X,), rewrites=[KNOWN], seconds=0.1).explanation
    assert found is not None
    assert "attention: einsum" in [each.rewrite for each in found.opportunities]
    assert sentences.how(found).startswith("`fast = burnish.optimize(model, rewrites=[...])` does")
    there = burnish.explain(model, (X,), rewrites=[KNOWN], target="h200").explanation
    assert there is not None
    assert "attention: einsum" in [each.rewrite for each in there.opportunities]
    fast = burnish.optimize(model, (X,), rewrites=[KNOWN], cache="off")
    after = fast.report((X,)).explanation
    assert after is not None
    (own,) = (each for each in after.opportunities if each.rewrite == "attention: einsum")
    assert own.measured_us is not None


def test_a_remembered_capture_is_one_without_rewrites(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    matched = []
    for rewrites in ([], [KNOWN], []):
        fast = burnish.optimize(copy.deepcopy(model), (X,), rewrites=rewrites)
        matched.append([record.matches for record in fast.schedule.history if record.name == "rewrite"])
        assert (torch.ops.burnish.attention.default in targets(fast)) == bool(rewrites)
    assert matched == [[], [{"attention: einsum": 1}], []]
    assert len(program_cache.program_files()) == 1


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [burnish.optimize, burnish.explain])
def test_what_is_no_rewrite_is_named(model: nn.Module, ask: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^rewrites\[1\]: a burnish\.Rewrite is needed, not function$"):
        ask(model, (X,), rewrites=[KNOWN, pattern])
    with pytest.raises(TypeError, match=r"^rewrites: a list of burnish\.Rewrite is needed, not Rewrite$"):
        ask(model, (X,), rewrites=KNOWN)


def test_what_is_no_function_is_named() -> None:
    with pytest.raises(TypeError, match=r"^replacement of the Rewrite 'x': a function is needed, not str$"):
        burnish.Rewrite("x", pattern, "attention")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^examples of the Rewrite 'x': a function is needed, not tuple$"):
        burnish.Rewrite("x", pattern, replacement, examples(torch.float32))  # type: ignore[arg-type]


def test_a_replacement_of_other_parameters_is_an_error(model: nn.Module) -> None:
    other = burnish.Rewrite("attention: other", pattern, lambda q, mask: q, examples)
    fast = burnish.optimize(model, rewrites=[other], cache="off")
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"^rewrite 'attention: other': .*parameter mask is none of"),
        ):
            fast(X)
    assert fast.schedule.programs == []


# --- what a replacement may call --------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "methods": lambda x: x.sin().cos(),
    "functions": lambda x: torch.cat((torch.sin(x), x), dim=-1),
    "an attribute": lambda x: (x.mT + 1).mT.contiguous(),
    "arithmetic": lambda x: 2 * x - x,
    "sizes": lambda x: x.reshape(x.shape[0] * x.shape[1], x.shape[2]).view(x.shape),
    "parts": lambda x: x.chunk(2, dim=-1)[1],
    "no change": lambda x: x.sin().to(x.dtype),
    "an index": lambda x: x[..., :4].exp(),
    "a new tensor": lambda x: x + torch.ones(x.shape[-1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_methods_and_functions_become_operators(name: str) -> None:
    call = CALLS[name]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(torch.relu(x)) * 2

    own = burnish.Rewrite(
        name,
        lambda x: call(torch.relu(x)) * 2,
        lambda x: call(x.clamp(min=0)) * 2,
        lambda dtype: (torch.randn(2, 3, 8, dtype=dtype),),
    )
    model, x = Model(), normal(2, 5, 8)
    fast = burnish.optimize(model, (x,), rewrites=[own], cache="off")
    assert step(fast, "rewrite").matches == {name: 1}
    assert aten.clamp.default in targets(fast)
    operators = (torch._ops.OpOverload, type(operator.mul))  # the latter of sizes
    calls = [node for node in fast.schedule.program.graph_module.graph.nodes if node.op.startswith("call_")]
    assert all(isinstance(node.target, operators) for node in calls)
    with torch.no_grad():
        for given in (x, normal(3, 7, 8)):
            assert torch.equal(fast(given), model(given))
