"""What could be saved: alike places together, a CUDA graph of the call, and what was measured of it afterwards."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from burnish.capture import capture
from burnish.hardware import DeviceInfo
from burnish.report.data import CUDA_GRAPH, Explanation, Opportunity
from burnish.report.fusions import Fusion, Miss, Rewritten
from burnish.report.kernels import Launch
from burnish.report.opportunities import _folded, capturing, opportunities_of, with_captured, with_measured
from burnish.report.predict import CostModel
from burnish.report.rows import Seen, folding_of, rows_of
from burnish.report.sizes import work_on_fakes
from tests.report.explanations import gpt2

PROFILE = gpt2(after=False).before


def attention(nodes: tuple[str, ...], count: int, before_us: float, after_us: float) -> Opportunity:
    return Opportunity("attention", "burnish.attention", "h.*", count, nodes, before_us, after_us)


# --- places that are alike --------------------------------------------------------------------------------------------


def test_a_layer_that_takes_more_counts_with_the_others() -> None:
    first, others = attention(("mask", "sdpa"), 1, 8.0, 4.0), attention(("sdpa",), 3, 4.0, 2.0)
    (found,) = _folded([first, others])
    assert (found.nodes, found.count) == (("sdpa",), 4)
    assert (found.before_us, found.after_us) == (5.0, 2.5), "means"
    assert found.saves_us == first.saves_us + others.saves_us


@pytest.mark.parametrize(
    "other",
    [
        attention(("sdpa", "mask"), 5, 4.0, 2.0),  # it is the rule
        attention(("view", "mask"), 1, 4.0, 2.0),
        replace(attention(("sdpa", "mask"), 1, 4.0, 2.0), op="burnish.linear"),
        replace(attention(("sdpa", "mask"), 1, 4.0, 2.0), block="encoder"),
        replace(attention(("sdpa", "mask"), 1, 4.0, 2.0), blocked_by="it is used elsewhere"),
    ],
)
def test_others_stay_apart(other: Opportunity) -> None:
    assert len(_folded([other, attention(("sdpa",), 3, 4.0, 2.0)])) == 2


def test_the_first_layer_makes_the_mask(bert: Explanation) -> None:
    (found,) = (each for each in bert.opportunities if each.op == "burnish.attention")
    assert found.count == 2
    assert len(found.nodes) == 1


def test_what_is_measured_of_alike_places_is_their_mean(ceilings: DeviceInfo) -> None:
    seen = three_ops()
    rows = rows_of(seen, folding_of(seen), CostModel.of(ceilings, cuda=True))
    graph = fx.Graph()
    one, more, other = (graph.call_function(torch.relu, ()) for _ in range(3))
    made = Seen(seen.graph_module, {}, {one: 2.0, more: 4.0, other: 50.0})
    fusions = [
        Fusion(("linear", "gelu"), (one,)),
        Fusion(("linear", "gelu", "tanh"), (more,)),
        Fusion(("gelu",), (other,)),
    ]
    folded = Opportunity("attention", "", "", 2, ("linear", "gelu"), 10.0, 5.0)
    (found,) = with_measured([folded], fusions, seen, rows, made)
    assert found.measured_us == 3.0
    apart = replace(folded, nodes=("linear", "gelu", "tanh"))
    assert [each.measured_us for each in with_measured([folded, apart], fusions, seen, rows, made)] == [2.0, 4.0]


# --- a CUDA graph -----------------------------------------------------------------------------------------------------


@functools.cache
def three_ops() -> Seen:
    x = torch.randn(2, 8)
    graph_module = capture(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Tanh()), (x,)).captured
    seen = Seen(graph_module, work_on_fakes(graph_module, [x]))
    seen.launches = {node: [Launch("kernel", 0, 1)] for node in seen.nodes}
    return seen


def captured(ceilings: DeviceInfo, us: float = PROFILE.end_to_end_us, why_not: str = "") -> list[Opportunity]:
    """Of a model of three ops, of which two become one and the last stays as it is."""
    costs = CostModel.of(ceilings, cuda=True)
    profile = replace(PROFILE, end_to_end_us=us)
    return capturing(profile, three_ops(), [Fusion(("linear", "gelu"), ())], costs, why_not)


def test_a_graph_saves_what_the_host_takes(ceilings: DeviceInfo) -> None:
    (found,) = captured(ceilings)
    costs = CostModel.of(ceilings, cuda=True)
    assert (found.rewrite, found.op, found.block, found.nodes) == (CUDA_GRAPH, "one launch", "", ())
    assert found.before_us == PROFILE.unattributed_us
    assert found.after_us == costs.call_us + costs.torch_us, "one of PyTorch's kernels stays"


def test_no_graph_where_the_host_is_in_time(ceilings: DeviceInfo) -> None:
    assert captured(ceilings, PROFILE.attributed_us + 6.0) == []


def test_a_graph_is_measured_by_what_it_leaves(ceilings: DeviceInfo) -> None:
    after, others = gpt2().after, gpt2().opportunities
    assert after is not None
    found, *rest = with_captured([*captured(ceilings), *others], after, "")
    assert found.measured_us == after.unattributed_us
    assert found.saved_us == pytest.approx(PROFILE.unattributed_us - after.unattributed_us)
    assert tuple(rest) == others
    (blocked, *_) = with_captured(captured(ceilings), after, "dropout is random")
    assert (blocked.measured_us, blocked.blocked_by) == (None, "dropout is random")


def test_what_cannot_be_captured_says_why(ceilings: DeviceInfo) -> None:
    (found,) = captured(ceilings, why_not="dropout is random")
    assert found.blocked_by == "dropout is random"


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_reasons_that_differ_in_nodes_numbers_are_one(ceilings: DeviceInfo) -> None:
    seen = three_ops()
    costs = CostModel.of(ceilings, cuda=True)
    reasons = ("linear_3 reads it", "linear_12 reads it", "3 rows", "4 rows")
    misses = [Miss("norm prologue", ("gelu",), reason) for reason in reasons]
    rows = rows_of(seen, folding_of(seen), costs)
    found = opportunities_of(Rewritten(seen.graph_module, [], misses), seen, seen, rows, costs)
    assert {each.blocked_by: each.count for each in found} == {"linear_3 reads it": 2, "3 rows": 1, "4 rows": 1}
