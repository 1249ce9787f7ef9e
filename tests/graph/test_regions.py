"""Parts of a model that run with gradients off or under another autocast, also one within the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from burnish.capture import capture
from tests.graph.test_autocast import same

Region = Callable[[], AbstractContextManager[object]]

REGIONS: dict[str, Region] = {
    "no_grad": torch.no_grad,
    "float32": partial(torch.autocast, "cpu", enabled=False),
    "bfloat16": partial(torch.autocast, "cpu", torch.bfloat16),
}


class Rotary(nn.Module):
    """Angles, and their own matrix, in a region within a region, each time that it is called."""

    def __init__(self, outer: Region, inner: Region) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        self.linear = nn.Linear(32, 32)

    def angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.outer():
            doubled = x * 2
            with self.inner():
                turned = doubled @ torch.eye(32)  # a constant that export lifts out of the region
                return turned.cos(), (turned @ x.mT).sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        cos, total = self.angles(x)
        again, _ = self.angles(cos.float())
        return self.linear(x) * cos + total + again


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("inner", REGIONS)
@pytest.mark.parametrize("outer", REGIONS)
def test_a_region_within_a_region(outer: str, inner: str, training: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    model = Rotary(REGIONS[outer], REGIONS[inner]).train(training)
    x = torch.randn(2, 64, 32)
    results, gradients = [], []
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        program = capture(model, (x,))
        for run in (model, lambda x: program.runnable(program.graph_module)(x)[0]):
            results.append(run(x))
            if training:
                gradients.append(torch.autograd.grad(results[-1].sum(), model.parameters()))
    left = {node.target for node in program.graph_module.graph.nodes}
    assert not left & {torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled}
    assert same(*results)
    assert not training or same(*gradients)
