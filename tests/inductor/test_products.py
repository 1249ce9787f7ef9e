"""Products that are widened next are written in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from burnish.inductor.products import widen_products

aten = torch.ops.aten


def targets_after(device: str, dtype: torch.dtype, also: bool) -> tuple[int, set[object]]:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        product = a @ b
        return (product.float(), product) if also else (product.float(),)

    with FakeTensorMode():
        given = [torch.empty(4, 4, dtype=dtype, device=device) for _ in range(2)]
        graph = make_fx(fn, decomposition_table=select_decomp_table())(*given)
    graph.graph.eliminate_dead_code()  # what a decomposition tried
    count = widen_products(graph)
    graph.graph.lint()
    nodes = graph.graph.find_nodes(op="call_function", target=aten.mm.dtype)
    assert all(node.meta["val"].dtype == torch.float32 and node.args[2] == torch.float32 for node in nodes)
    return count, {node.target for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_they_are(dtype: torch.dtype) -> None:
    assert targets_after("cuda", dtype, also=False) == (1, {aten.mm.dtype})


@pytest.mark.parametrize(
    ("device", "dtype", "also"),
    [("cpu", torch.bfloat16, False), ("cuda", torch.float32, False), ("cuda", torch.bfloat16, True)],
    ids=["on a CPU", "in float32", "where both are wanted"],
)
def test_elsewhere_they_are_left(device: str, dtype: torch.dtype, also: bool) -> None:
    count, targets = targets_after(device, dtype, also)
    assert (count, aten.mm.default in targets) == (0, True)
