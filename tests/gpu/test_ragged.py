"""Padding removed, and nested tensors, on a real device: any number of tokens by CUDA graphs, and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.numerics import assert_close
from tests.ragged.test_nested import LENGTHS, CausalSelfAttention, assert_each, jagged
from tests.ragged.test_unpad import MASKS, Encoder, batch, pooled, real

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_masks_of_any_pattern_by_graphs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    ids, mask = (t.cuda() for t in batch(MASKS["right padding"]()))
    fast = burnish.optimize(copy.deepcopy(model), (ids, mask), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"  # type: ignore[attr-defined]
    for _ in range(2):  # captured, and replayed
        for name, make in MASKS.items():
            ids, mask = (t.cuda() for t in batch(make()))
            with torch.no_grad():
                result, eager, true = fast(ids, mask), model(ids, mask), exact(ids, mask)
            if mask.any():
                assert_close(*(real(t, mask) for t in (result, eager, true)))
            assert name == "full rows" or not result[mask == 0].any()


def test_gradients() -> None:
    torch.manual_seed(0)
    model = Encoder(pooled).train().to("cuda", torch.bfloat16)
    fast = burnish.optimize(copy.deepcopy(model), padding="remove", cache="off")
    exact = copy.deepcopy(model).double()
    args = tuple(t.cuda() for t in batch(MASKS["right padding"]()))
    found = []
    for _ in range(2):
        fast.zero_grad()
        fast(*args).square().sum().backward()
        found.append([p.grad.clone() for p in fast.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for each in (model, exact):
        each(*args).square().sum().backward()
    assert_close(found[0], *([p.grad for p in each.parameters()] for each in (model, exact)))


@pytest.mark.parametrize("training", [False, True])
def test_nested_in_nested_out(training: bool) -> None:
    torch.manual_seed(0)
    model = CausalSelfAttention().train(training).to("cuda", torch.float16)
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    for lengths in (LENGTHS, (5, 2), (300, 1, 9)):
        x = jagged(*lengths, dtype=torch.float16).cuda()
        with torch.no_grad():
            result = fast(x)
        assert result.offsets() is x.offsets()
        assert_each(result, model, x)
    assert fast.serving.nested.reasons == []  # type: ignore[attr-defined]
