"""The kernels that find a padded batch's real tokens and put them back, against PyTorch's operators for the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import randn

pytest.importorskip("triton")

from burnish.kernels import tokens as kernels
from burnish.kernels.launch import Launch, Target, recording
from burnish.ragged import tokens as ragged
from burnish.ragged.tokens import INPUTS, TokenMemory, tokens_of

MASKS: dict[str, Tensor] = {
    "gaps": (randn(5, 40, seed=1) > 0).long(),
    "an empty row": torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]]),
    "a gap in a row that begins as the one before ends": torch.tensor([[0, 0, 1], [1, 0, 1]]),
    "right padding, bool": torch.arange(70) < torch.tensor([70, 3, 0, 69])[:, None],
    "nothing, float": torch.zeros(2, 5),
    "all": torch.ones(3, 128, dtype=torch.int32),
    "rows longer than a block": (torch.arange(1500) < torch.tensor([1025, 1500])[:, None]).long(),
    "more places than one launch takes": (randn(30, 300, seed=2) > 0.5).long(),
    "other strides": (randn(33, 6, seed=3) > 0).t()[:, ::2],
    "every other column": (randn(30, 300, seed=4) > 0)[:, ::2],
    "the same row again": (randn(1, 700, seed=5) > 0).expand(6, 700),
}


@pytest.mark.parametrize("step", [4, 128])
@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_tokens_are_those_of_operators(name: str, ask: bool, step: int) -> None:
    mask = MASKS[name]
    memory = TokenMemory(mask, step)
    for part in (*INPUTS, "found"):
        getattr(memory, part).fill_(-7)
    found, true = tokens_of(mask, ask, memory=memory), tokens_of(mask, ask, step)
    assert (found.real, found.contiguous) == (true.real, true.contiguous)
    for part in INPUTS[:-1]:
        one, other = getattr(found, part), getattr(true, part)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), part
    assert found.sources is not None
    numbers = torch.full((mask.numel() + 1,), -1, dtype=torch.int32)
    numbers[true.places[: true.real]] = torch.arange(true.real, dtype=torch.int32)
    assert torch.equal(found.sources, numbers[:-1])


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_tokens_of_all_places(name: str, ask: bool) -> None:
    """As many as there are places, the dummies after the real ones and in no sequence."""
    mask = MASKS[name]
    memory = TokenMemory(mask, None)
    for part in INPUTS:
        getattr(memory, part).fill_(-7)
    found, true, places = tokens_of(mask, ask, memory=memory), tokens_of(mask), mask.numel()
    assert (found.real, found.contiguous) == (None, None)
    assert memory.count() == true.real
    assert torch.equal(found.cu_seqlens, true.cu_seqlens[: mask.shape[0] + 1])
    for part, dummy in (("places", places), ("nearest", places - 1), ("columns", mask.shape[1] - 1)):
        tokens = getattr(found, part)
        assert tokens.shape == (places,)
        assert torch.equal(tokens[: true.real], getattr(true, part)[: true.real])
        assert (tokens[true.real :] == dummy).all()
    assert found.sources is not None
    numbers = torch.full((places + 1,), -1, dtype=torch.int32)
    numbers[true.places[: true.real]] = torch.arange(true.real, dtype=torch.int32)
    assert torch.equal(found.sources, numbers[:-1])


def test_what_no_kernel_puts_back_looks_at_no_dummy(monkeypatch: Any) -> None:
    mask = MASKS["gaps"]
    found = tokens_of(mask, memory=TokenMemory(mask, None))
    packed = randn(mask.numel(), 3, 2, dtype=torch.float64)
    packed[int(mask.sum()) :] = float("nan")
    whole = ragged.put_back(packed, found.places, found.sources, *mask.shape)
    assert torch.equal(whole[mask != 0], packed[: int(mask.sum())])
    assert not whole[mask == 0].any()


def test_the_same_memory_for_every_mask() -> None:
    """What a graph reads by its address."""
    memory = TokenMemory(MASKS["gaps"], 16)
    addresses = set()
    for count in (0, 16, 17, 200, 33):
        mask = (torch.arange(200) < count).view(5, 40)
        found, true = tokens_of(mask, memory=memory), tokens_of(mask, step=16)
        assert all(torch.equal(getattr(found, part), getattr(true, part)) for part in INPUTS[:-1])
        addresses.add(tuple(getattr(found, part).data_ptr() for part in INPUTS))
    assert len(addresses) == 1


@pytest.mark.parametrize("by_column", [(False,), (True, False), (False, True, False), (False, False, True, True)])
def test_take(by_column: tuple[bool, ...]) -> None:
    mask = MASKS["more places than one launch takes"]
    found = tokens_of(mask, step=128)
    sizes = [mask.shape[1] if by else mask.numel() for by in by_column]
    sources = [torch.arange(2 * n).mul(7 + i)[:: 1 + i % 2][:n] for i, n in enumerate(sizes)]
    taken = kernels.take(found.nearest, found.columns, sources, by_column)
    expected = ragged.take(found.nearest, found.columns, sources, by_column)
    assert taken.dtype == torch.int64
    assert all(torch.equal(one, other) for one, other in zip(taken, expected, strict=True))
    real = mask.reshape(-1) != 0
    for one, source, by in zip(expected, sources, by_column, strict=True):
        whole = source.repeat(mask.shape[0]) if by else source
        assert torch.equal(one[: found.real], whole[real])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rest", [(), (5,), (2, 24), (3000,)])
def test_put_back(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = MASKS["an empty row"]
    found = TokenMemory(mask, 4).find(mask, False)
    assert found.sources is not None
    packed = randn(found.places.shape[0], *rest, dtype=dtype)
    whole = ragged.put_back(packed, found.places, None, *mask.shape)
    assert torch.equal(kernels.put_back(packed, found.sources).view(whole.shape), whole)
    assert torch.equal(whole[mask != 0], packed[: found.real])
    assert not whole[mask == 0].any()
    strided = packed.unsqueeze(-1).expand(*packed.shape, 2)
    assert torch.equal(kernels.put_back(strided, found.sources).view(*whole.shape, 2)[..., 0], whole)


@pytest.mark.parametrize(
    ("rows", "length", "ask", "launches"), [(32, 128, False, 1), (32, 128, True, 2), (64, 512, False, 2)]
)
def test_launches(rows: int, length: int, ask: bool, launches: int) -> None:
    mask, seen = torch.zeros(rows, length, dtype=torch.int64), list[Launch]()
    memory = TokenMemory(mask)
    assert memory.found is not None
    memory.found.zero_()
    with recording(seen.append, Target((9, 0), 132)):
        memory.find(mask, ask)
    assert len(seen) == launches
    assert seen[-1].grid == (rows + 1,)


def test_gradients_do_not_go_by_the_kernel(monkeypatch: Any) -> None:
    mask = MASKS["gaps"]
    found = TokenMemory(mask, 4).find(mask, False)
    packed = randn(found.places.shape[0], 3).requires_grad_()
    monkeypatch.setattr(ragged, "triton_why_not", lambda x: [])
    whole = ragged.put_back(packed, found.places, found.sources, *mask.shape)
    whole.square().sum().backward()
    grad = packed.grad
    assert grad is not None
    assert torch.equal(grad[: found.real], 2 * packed.detach()[: found.real])
    assert not grad[found.real :].any()
    with torch.no_grad():
        assert torch.equal(ragged.put_back(packed, found.places, found.sources, *mask.shape), whole)
