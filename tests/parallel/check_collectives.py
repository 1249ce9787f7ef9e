"""Collectives, their gradients, and graphs with collectives in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional

import burnish
from burnish import numerics, ops
from burnish.parallel import all_gather, all_reduce, copy_to_region, own_slice, reduce_scatter
from tests.parallel.models import check_served
from tests.parallel.ranks import RANKS
from tests.zoo.case import hidden, seeded

WORLD = "0"  # how torch names the group of all processes


def collectives_and_their_gradients(rank: int, folder: Path) -> None:
    """Each is compared with what one process does with the tensors of all ranks."""
    mine = [hidden(3, 4, 6, torch.float64, seed=10 + r).requires_grad_() for r in range(RANKS)]
    total = torch.stack([x.detach() for x in mine]).sum(dim=0)
    x, other = mine[rank], mine[1 - rank].detach()
    weights = hidden(3, 4, 12, torch.float64, seed=20)  # one loss of all ranks together
    part = slice(6 * rank, 6 * rank + 6)

    def check(result: Tensor, expected: Tensor, loss: Tensor, gradient: Tensor) -> None:
        assert torch.equal(result, expected)
        (found,) = torch.autograd.grad(loss, x)
        assert torch.equal(found, gradient)

    y = all_reduce(x, WORLD)
    check(y, total, (y * weights[..., :6]).sum(), weights[..., :6])
    y = copy_to_region(x, WORLD)
    check(y, x, (y * weights[..., part]).sum(), weights[..., :6] + weights[..., 6:])
    y = all_gather(x, -1, WORLD)
    both = torch.cat([x, other] if rank == 0 else [other, x], dim=-1)
    check(y, both, (y * weights).sum(), weights[..., part])
    y = all_gather(x, 0, WORLD, sum_gradients=True)
    both = torch.cat([x, other] if rank == 0 else [other, x])
    check(y, both, (y * (1 + rank)).sum(), torch.full_like(x, 3))
    rows = slice(2 * rank, 2 * rank + 2)
    y = own_slice(x, 1, WORLD)
    check(y, x[:, rows], (y * (1 + rank)).sum(), torch.ones_like(x) * torch.tensor([1, 1, 2, 2])[:, None])
    y = reduce_scatter(x, 1, WORLD)
    check(y, total[:, rows], (y * (1 + rank)).sum(), torch.ones_like(x) * torch.tensor([1, 1, 2, 2])[:, None])
    for collective in (own_slice, reduce_scatter):
        with pytest.raises(ValueError, match="a size of 3 along axis 0 does not divide among 2 ranks"):
            collective(x, 0, WORLD)


def summed_added_and_normalized(rank: int, folder: Path) -> None:
    """The Ops that end a branch: what one process has of the sum, with the gradients that each rank wants."""
    xs = [hidden(3, 2, 6, torch.float64, seed=30 + r).requires_grad_() for r in range(RANKS)]
    residual = hidden(3, 2, 6, torch.float64, seed=40).requires_grad_()
    bias, weight, shift = (hidden(1, 1, 6, torch.float64, seed=s)[0, 0].clone().requires_grad_() for s in (41, 42, 43))
    loss_weights = hidden(3, 4, 6, torch.float64, seed=44)
    for op, norm in ((ops.all_reduce_add_rms_norm, (weight,)), (ops.all_reduce_add_layer_norm, (weight, shift))):
        tensors = (xs[rank], bias, residual, *norm)

        def found(function: Callable[..., Any], x: Tensor, group: str, tensors: Any = tensors, norm: Any = norm) -> Any:
            """Results, and what a loss that all ranks have alike says of each tensor."""
            results = function(x, bias, residual, *norm, 1e-5, group, True)
            loss = (torch.cat(results, dim=1) * loss_weights).sum()
            return *results, *torch.autograd.grad(loss, (x, *tensors[1:]))

        expected = found(op.reference, torch.stack([x.detach() for x in xs]).sum(dim=0).requires_grad_(), "")
        for way in (op, op.overload, op.reference, op.with_backward("torch")):
            assert_same_sums(found(way, xs[rank], WORLD), expected)

        args = [tensor.detach().clone() for tensor in tensors]
        before = args[0].clone()
        given = op.bind(*args, 1e-5, WORLD)
        with torch.no_grad():
            for normed, total in (op(*given), op.impls["torch"].fn(*given)):
                assert_same_sums((normed, total), expected[:2])
            assert torch.equal(args[0], before)
            in_place = op.impls["torch"].in_place
            assert in_place is not None
            assert_same_sums(in_place(*given), expected[:2])
            assert not torch.equal(args[0], before), "it holds the sum now"


def assert_same_sums(mine: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """Both in float64, so that only a difference in meaning is left; judged in float32: ranks add in another order."""
    numerics.assert_close(
        [t.detach().float() for t in mine], [t.detach().float() for t in whole], [t.detach() for t in whole]
    )


class Unread(nn.Module):
    """Asks twice for the same sum, and for one that it does not read."""

    def __init__(self, sums: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sums = sums
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.sums(x * 2)
        return self.norm(self.sums(x) + self.sums(x))


def no_collective_is_left_out(rank: int, folder: Path) -> None:
    """Neither ours nor torch's own, whose second node waits; of torch's, equal ones are merged, on all ranks alike."""
    x = hidden(2, 5, 16, torch.float32, seed=3 + rank)
    theirs = torch.ops._c10d_functional.all_reduce.default
    ours = torch.ops.burnish_parallel.all_reduce.default
    for overload, sums in (
        (ours, lambda x: all_reduce(x, WORLD)),
        (theirs, lambda x: functional.wait_tensor(functional.all_reduce(x, "sum", dist.group.WORLD))),
    ):
        model = seeded(Unread(sums))
        with torch.no_grad():
            fast = burnish.optimize(model, (x,), cache="off")
            assert torch.equal(fast(x), fast(x))
            numerics.assert_close(fast(x), model(x), copy.deepcopy(model).double()(x.double()))
        check_served(fast)
        graph = fast.schedule.program.graph_module.graph
        nodes = [node for node in graph.nodes if node.target is overload]
        fused = [node for node in graph.nodes if node.target is ops.all_reduce_add_layer_norm.overload]
        assert (len(nodes), len(fused)) == ((2, 1) if overload is ours else (2, 0))
        assert overload is ours or all("wait_tensor" in str(user.target) for node in nodes for user in node.users)
