"""Casts of a training graph's inputs are one operator's, on CUDA devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.compile_casts import cast_together

aten = torch.ops.aten
SIZES = [(3,), (4, 3), (5, 4), (1, 5), (7, 1), (7,), (2, 2), (6,)]


def chain(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Each weight is cast where it is needed, after something else."""
    found = []
    for weight in weights:
        x = x.sin()
        found.append(weight.bfloat16().exp())
    return [x, *found, weights[0].half(), (weights[1] + 1).bfloat16()]


def traced(device: str, count: int = 8, turned: bool = False) -> fx.GraphModule:
    with FakeTensorMode():
        given = [torch.empty(size, device=device) for size in SIZES[:count]]
        given[1] = given[1].t() if turned else given[1]
        graph = make_fx(chain, decomposition_table=select_decomp_table())(torch.empty(2, device=device), *given)
    graph.graph.eliminate_dead_code()
    return graph


def casts(graph: fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default))


def test_those_of_inputs_are_one() -> None:
    graph = traced("cuda")
    before = casts(graph)
    assert cast_together(graph) == 8
    graph.graph.lint()
    assert casts(graph) == before - 8, "of another dtype there is one, and one is of what was computed"
    (copied,) = graph.graph.find_nodes(op="call_function", target=aten._foreach_copy.default)
    assert [node.meta["val"].shape for node in copied.args[1]] == [torch.Size(size) for size in SIZES]
    assert [part.meta["val"].dtype for part in copied.users] == [torch.bfloat16] * 8


@pytest.mark.parametrize(
    ("device", "count", "turned"), [("cpu", 8, False), ("cuda", 7, False), ("cuda", 8, True)], ids=str
)
def test_few_turned_ones_and_a_cpus_are_left(device: str, count: int, turned: bool) -> None:
    graph = traced(device, count, turned)
    before = graph.code
    assert cast_together(graph) == 0
    graph.recompile()
    assert graph.code == before


def test_the_values_are_the_casts() -> None:
    """On a CPU, which takes them as well."""
    graph = traced("cuda")
    cast_together(graph)
    for node in graph.graph.find_nodes(op="call_function", target=aten.empty.memory_format):
        node.kwargs = {**node.kwargs, "device": "cpu"}
    graph.recompile()
    given = [torch.randn(2), *map(torch.randn, SIZES)]
    assert all(map(torch.equal, graph(*given), chain(*given)))
