"""Which kernels ran for which node: read from a trace, and seen under a call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.capture import capture
from burnish.report.kernels import Launch, launches_by_range, merged, operators
from burnish.report.walk import Walk
from tests.report.traces import host, on_device

TRACE = [
    {"ph": "M", "name": "process_name", "pid": 1},
    host("user_annotation", "burnish node 0:3", 100, 50),
    host("cpu_op", "aten::linear", 101, 48),
    host("cuda_runtime", "cudaLaunchKernel", 110, 5, correlation=1),
    host("cuda_runtime", "cudaMemsetAsync", 120, 5, correlation=2),
    host("user_annotation", "burnish node 0:4", 160, 20),
    host("cuda_driver", "cuLaunchKernelEx", 165, 5, correlation=3),
    host("cuda_runtime", "cudaLaunchKernel", 165, 5, thread=8, correlation=4),  # another thread's
    host("cuda_runtime", "cudaDeviceSynchronize", 200, 90, correlation=5),
    host("gpu_user_annotation", "burnish node 0:3", 130, 70, thread=20),
    on_device("gemm", 130, 40, 1, grid=[8, 1, 1], block=[128, 1, 1]),
    on_device("memset", 165, 10, 2, "gpu_memset"),
    on_device("norm", 172, 8, 3, grid=[4, 1, 1], block=[64, 1, 1]),
    on_device("stranger", 190, 10, 4),
]


def test_a_kernel_belongs_to_the_range_that_launched_it() -> None:
    found = launches_by_range(TRACE)
    assert list(found) == ["burnish node 0:3", "burnish node 0:4"]
    gemm, memset = found["burnish node 0:3"]
    assert gemm == Launch("gemm", 130, 40, (8, 1, 1), (128, 1, 1))
    assert (memset.name, memset.us) == ("memset", 5), "what it adds after the one that it overlaps with"
    assert memset.beside_us == 5
    (norm,) = found["burnish node 0:4"]
    assert norm.us == 5


def test_equal_kernels_are_put_together() -> None:
    launches = [Launch("a", 0, 4), Launch("b", 4, 2), Launch("a", 6, 4)] * 2
    assert [(k.name, k.launches, k.us) for k in merged(launches, us=20, repeats=2)] == [("a", 2, 16), ("b", 1, 4)]
    assert merged([], 3, 1) == ()


def test_on_the_cpu_operators_are_what_runs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.matmul(self.linear(x), x.new_ones(4, 4)).view(2, 2, 2).softmax(-1)

    x = torch.randn(1, 2, 4)
    graph_module = capture(Model(), (x,)).captured
    with torch.no_grad():
        found = operators(Walk(graph_module), [x])
    names = {node.name: [launch.name for launch in launches] for node, launches in found.items()}
    assert names["linear"] == ["aten.addmm"]
    assert names["matmul"] == ["aten.mm"], "and a view that says it is none"
    assert names["softmax"] == ["aten._softmax"]
    assert all(names[name] == [] for name in names if name.startswith("view"))


@pytest.mark.gpu
def test_on_cuda() -> None:
    from burnish.report.kernels import kernels

    model, x = nn.Sequential(nn.Linear(256, 256), nn.GELU()).cuda(), torch.randn(64, 256, device="cuda")
    graph_module = capture(model, (x,)).captured
    walk = Walk(graph_module)
    with torch.no_grad():
        walk([x], lambda node, run, args, kwargs: run(*args, **kwargs))
        found, times = kernels(walk, [x])
    by_name = {node.name: launches for node, launches in found.items()}
    assert all(by_name[name] and by_name[name][0].grid for name in ("linear", "gelu"))
    assert all(times[node] > 0 for node in found)
