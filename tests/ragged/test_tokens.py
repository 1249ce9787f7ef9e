"""Where the real tokens of a padded batch are, with and without the dummies that round their number up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import burnish
from burnish.capture import capture
from burnish.numerics import assert_close
from burnish.ragged import entry
from burnish.ragged import tokens as ragged
from burnish.ragged.tokens import INPUTS, tokens_of
from burnish.ragged.unpad import unpad
from burnish.rewrites import RAISE, apply
from burnish.runtime.cuda_graph import GraphPool
from tests.ragged.test_unpad import MASKS, Encoder, batch, real


def test_places_and_offsets() -> None:
    tokens = tokens_of(torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]]), ask_contiguous=True)
    assert tokens.places.tolist() == [1, 2, 6, 8]
    assert tokens.columns.tolist() == [1, 2, 0, 2]
    assert tokens.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert tokens.cu_seqlens.dtype == torch.int32
    assert (tokens.real, tokens.contiguous) == (4, False)
    assert tokens_of(torch.tensor([[0, 1, 1], [1, 1, 0]]), ask_contiguous=True).contiguous
    assert tokens_of(torch.ones(2, 3)).contiguous is None


@pytest.mark.parametrize("step", [4, 16, 100])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 20])
def test_dummies(count: int, step: int) -> None:
    mask = torch.zeros(20, dtype=torch.bool).index_fill_(0, torch.arange(count), True).view(4, 5)
    tokens = tokens_of(mask, step=step)
    assert tokens.places.shape[0] == max(step, -(-count // step) * step)
    assert tokens.places[:count].tolist() == list(range(count))
    assert (tokens.places[count:] == 20).all()
    assert tokens.nearest.tolist() == [*range(count), *[19] * (tokens.places.shape[0] - count)]
    lengths = tokens.cu_seqlens.diff()
    assert lengths.shape[0] == 4 + -(-step // 5)  # whatever the mask: a captured graph counts on it
    assert int(lengths.sum()) == tokens.places.shape[0]
    assert int(lengths.max()) <= 5
    assert int(lengths.min()) >= 0


@pytest.mark.parametrize("name", ["right padding", "gaps", "full rows", "no token at all"])
def test_dummies_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    program = capture(model, batch(MASKS["right padding"]()))
    apply("raise", RAISE, program.graph_module)
    unpadded = unpad(program.graph_module)
    assert unpadded.mask is not None
    ids, mask = batch(MASKS[name]())
    with torch.no_grad():
        tokens = tokens_of(unpadded.mask([ids, mask]), step=16)
        result: Tensor = unpadded.graph_module(ids, mask, *tokens[: len(INPUTS)])[0]
        eager, true = model(ids, mask), copy.deepcopy(model).double()(ids, mask)
    assert not result[mask == 0].any()
    if mask.any():
        assert_close(*(real(t, mask) for t in (result, eager, true)))


def test_a_model_on_tokens_found_by_the_kernel(monkeypatch: Any) -> None:
    """As on CUDA, but for the graphs: every mask's tokens in the same memory, put back by a kernel."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = Encoder().eval()
    seen: list[Any] = []
    for module in (entry, ragged):
        monkeypatch.setattr(module, "has_kernel", lambda x: not isinstance(x, FakeTensor))
    monkeypatch.setattr(ragged, "triton_why_not", lambda x: [])
    monkeypatch.setattr(GraphPool, "enter", lambda self, device: seen.append(device))
    fast = burnish.optimize(copy.deepcopy(model), batch(MASKS["right padding"]()), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"  # type: ignore[attr-defined]
    for name in ("gaps", "a row without tokens", "one token", "no token at all", "other sizes", "right padding"):
        ids, mask = batch(MASKS[name]())
        before = len(seen)
        with torch.no_grad():
            result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
        assert len(seen) > before
        if mask.any():
            assert_close(*(real(t, mask) for t in (result, eager, true)))
        assert not result[mask == 0].any()
    before = len(seen)
    args = batch(MASKS["right padding"]())
    fast(*args).sum().backward()  # gradients read tokens of their own
    assert len(seen) == before
    ids, mask = batch(MASKS["right padding"]().repeat(10, 1))  # of which a part is verified
    fast = burnish.optimize(copy.deepcopy(model), (ids, mask), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "210 of 360 tokens are real"  # type: ignore[attr-defined]
    with torch.no_grad():
        result, eager, true = fast(ids, mask), model(ids, mask), copy.deepcopy(model).double()(ids, mask)
    assert_close(*(real(t, mask) for t in (result, eager, true)))
