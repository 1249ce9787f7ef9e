"""What nodes cost, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish import ops
from burnish.report.costs import Work, work_of

aten = torch.ops.aten


def work(target: Any, *args: Any, **kwargs: Any) -> Work:
    return work_of(target, args, kwargs, target(*args, **kwargs))


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


X, W, B = tensor(2, 3, 8), tensor(5, 8), tensor(5)
Q, K = tensor(1, 4, 6, 16), tensor(1, 4, 10, 16)
IDS = tensor(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("found", "kind", "flops", "elements"),
    [
        (work(aten.linear.default, X, W, B), "product", 2 * 6 * 8 * 5, 48 + 40 + 5 + 30),
        (work(aten.matmul.default, X, W.t()), "product", 2 * 6 * 8 * 5, 48 + 40 + 30),
        (work(aten.addmm.default, B, X[0], W.t()), "product", 2 * 3 * 8 * 5, 5 + 24 + 40 + 15),
        (work(aten.einsum.default, "bsk,nk->bsn", [X, W]), "product", 2 * 6 * 8 * 5, 48 + 40 + 30),
        (work(aten.conv1d.default, X, tensor(4, 3, 3)), "product", 2 * 2 * 4 * 6 * 3 * 3, 48 + 36 + 48),
        (work(aten.add.Tensor, X, X), "pass", 48, 48 + 48),
        (work(aten.add.Tensor, X, tensor(8)), "pass", 48, 48 + 8 + 48),
        (work(aten.mul.Tensor, X, tensor(1, 1, 8).expand(2, 3, 8)), "pass", 48, 48 + 8 + 48),
        (work(aten.softmax.int, X, -1), "pass", 48, 48 + 48),
        (work(aten.sum.dim_IntList, X, [-1]), "pass", 48, 48 + 6),
        (work(aten.clone.default, X), "pass", 48, 48 + 48),
        (work(aten.zeros_like.default, X), "pass", 48, 48),
        (work(aten.add_.Tensor, X.clone(), X), "pass", 48, 48 + 48 + 48),
        (work(aten.scaled_dot_product_attention.default, Q, K, K), "attention", 4 * 4 * 6 * 10 * 16, 2 * 384 + 2 * 640),
        (
            work(aten.scaled_dot_product_attention.default, Q, K, K, tensor(6, 10)),
            "biased attention",
            4 * 4 * 6 * 10 * 16,
            2 * 384 + 2 * 640 + 60,
        ),
        (
            work(aten.scaled_dot_product_attention.default, Q, Q, Q, is_causal=True),
            "attention",
            4 * 4 * 21 * 16,
            4 * 384,
        ),
    ],
)
def test_counted_by_hand(found: Work, kind: str, flops: int, elements: int) -> None:
    assert (found.kind, found.flops, found.bytes) == (kind, flops, 4 * elements)


def test_a_lookup_reads_what_it_returns() -> None:
    found = work(aten.embedding.default, tensor(1000, 8), IDS)
    assert (found.kind, found.flops) == ("pass", 0)
    assert found.bytes == 4 * 48 + 4 * 48 + 8 * 6
    assert found.dtype is torch.float32


@pytest.mark.parametrize(
    "found",
    [
        work(aten.view.default, X, [6, 8]),
        work(aten.transpose.int, X, 0, 1),
        work(aten.expand.default, X[:1], [4, 3, 8]),
        work(aten.reshape.default, X, [6, 8]),
        work(aten.contiguous.default, X),
        work(aten.to.dtype, X, torch.float32),
        work(aten.split.Tensor, X, 4, -1),
        work(aten.dropout.default, X, 0.5, False),
    ],
)
def test_views_are_free(found: Work) -> None:
    assert (found.kind, found.flops, found.bytes) == ("free", 0, 0)


def test_a_reshape_that_copies_is_none() -> None:
    assert work(aten.reshape.default, X.transpose(0, 1), [6, 8]).bytes == 4 * 96


def test_an_op_counts_by_its_own_cost() -> None:
    found = work(ops.linear.overload, X, W, B, "gelu")
    cost = ops.linear.cost(X, W, B, "gelu")
    assert (found.kind, found.flops, found.bytes) == ("product", cost.flops, cost.bytes)
    assert work(ops.layer_norm.overload, X, tensor(8), tensor(8)).kind == "pass"
    assert work(ops.attention.overload, Q, Q, Q, tensor(6, 6)).kind == "biased attention"


def test_shapes_are_told() -> None:
    found = work(aten.linear.default, X, W, B)
    assert found.inputs == ("float32[2, 3, 8]", "float32[5, 8]", "float32[5]")
    assert found.output == "float32[2, 3, 5]"
    assert found.written == 4 * 30
