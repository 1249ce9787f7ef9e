"""`torch.compile(backend="burnish")` with several ranks gives the gradients of one process on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from burnish.inductor import backend
from burnish.lower import op_of
from burnish.numerics import assert_close
from burnish.tuning import Tuner
from tests.parallel.ranks import RANKS, Check
from tests.zoo.case import seeded, token_ids
from tests.zoo.plain import NanoGPT

IDS = token_ids(2 * RANKS, 12, 50)


class Loss(nn.Module):
    """A GPT of one block with its loss, whose head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = NanoGPT(1, 32, 2, 16, 50, bias=True, sdpa=True, dropout=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.gpt(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def replicated(model: nn.Module) -> tuple[Callable[..., Tensor], nn.Module]:
    return torch.compile(DistributedDataParallel(model), backend="burnish"), model


def sharded(model: nn.Module) -> tuple[Callable[..., Tensor], nn.Module]:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.gpt.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return torch.compile(model, backend="burnish"), model


def check(make: Callable[..., tuple[Callable[..., Tensor], nn.Module]], rank: int, folder: Path) -> None:
    """Two steps, so that what was compiled in the first is used again."""
    torch._dynamo.reset()
    compiled: set[str] = set()

    def note(graph_module: fx.GraphModule, tuner: Tuner) -> None:
        compiled.update(op.name for node in graph_module.graph.nodes if (op := op_of(node.target)) is not None)

    whole = seeded(Loss())
    exact = copy.deepcopy(whole).double()
    run, model = make(copy.deepcopy(whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose_impls", note)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            run(IDS.chunk(RANKS)[rank]).backward()
    assert {"attention_with_logsumexp", "attention_backward_packed"} <= compiled
    for each in (whole, exact):
        each(IDS).backward()
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        found = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        eager, true = (each.get_parameter(name).grad for each in (whole, exact))
        assert_close(found, eager, true)


CHECKS: dict[str, Check] = {"replicated": partial(check, replicated), "sharded": partial(check, sharded)}
