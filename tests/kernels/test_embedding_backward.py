"""The gradient of a table as Triton kernels, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import embedding_backward as op

pytest.importorskip("triton")

from burnish.kernels import embedding_backward as kernels
from burnish.kernels.embedding_backward import embedding_backward, embedding_backward_configs
from burnish.kernels.launch import Launch, Target, launch, recording
from burnish.ops import _triton

HOPPER = Target((9, 0), 132)


def draw(*shape: int, entries: int, seed: int = 0) -> Tensor:
    return torch.randint(entries, shape, generator=torch.Generator().manual_seed(seed))


def check(grad: Tensor, ids: Tensor, entries: int, *tied: Tensor | None) -> Tensor:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN, and as no index
    try:
        result = embedding_backward(grad, ids, entries, *tied)
        again = embedding_backward(grad, ids, entries, *tied) if len(ids) < 400 else result
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(result, again)
    assert_close(result, op.reference(grad, ids, entries, *tied), oracle(op.reference, grad, ids, entries, *tied))
    return result


IDS = {
    "several chunks": draw(1200, entries=90),
    "one id more than a chunk": torch.arange(1025).remainder(4),
    "two rows in all chunks": draw(2100, entries=2, seed=1),
    "all the same": torch.full((1100,), 3),
    "a row that begins with a block and ends with one": torch.tensor([0] * 16 + [1] * 32 + [2] * 16),
    "rows that meet within a block": torch.tensor([5] * 20 + [6] * 20 + [7] * 3 + [8] * 25),
    "rows of two over the edges of blocks": torch.arange(33).add(1).div(2, rounding_mode="floor"),
    "a full block": torch.tensor([4] * 16),
    "in order": torch.arange(300),
    "backwards": torch.arange(300).flip(0),
    "one": torch.tensor([2]),
    "of no row": torch.tensor([-1, 800, 3, -(2**40), 2**40, 3] * 10),
}


@pytest.mark.parametrize("name", IDS)
def test_sums_of_rows(name: str) -> None:
    ids = IDS[name]
    entries = int(ids[(ids >= 0) & (ids < 800)].max()) + 3
    table = check(randn(len(ids), 8, seed=1), ids, entries)
    seen = torch.zeros(entries, dtype=torch.bool)
    seen[ids[(ids >= 0) & (ids < entries)]] = True
    assert not table[~seen].count_nonzero()


@pytest.mark.parametrize("config", embedding_backward_configs(768), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_config_adds_the_products_gradient(config: kernels.Config, dtype: torch.dtype) -> None:
    grad, ids = randn(50, 320, dtype=dtype, seed=0), torch.cat((draw(25, entries=19), torch.full((25,), 4)))
    tied = randn(19, 320, dtype=torch.bfloat16, seed=1), torch.tensor(0.3)
    for given in ((), tied[:1], tied):
        result = embedding_backward(grad, ids, 19, *given, config=config)
        assert_close(result, op.reference(grad, ids, 19, *given), oracle(op.reference, grad, ids, 19, *given))


def test_strided_inputs() -> None:
    grad, ids = randn(6, 5, 24, seed=0).transpose(0, 1), draw(6, 5, entries=9).t()
    check(grad, ids.int(), 9, randn(9, 48, seed=1)[:, ::2], torch.tensor(2.0, dtype=torch.bfloat16))
    check(grad, ids, 9, randn(9, 48, seed=1)[:, 8:32])


def test_a_row_of_very_many_is_added_in_float32() -> None:
    """A sum of 2000 terms in bfloat16 would stop growing at 256."""
    result = embedding_backward(torch.ones(2000, 8, dtype=torch.bfloat16), torch.zeros(2000, dtype=torch.long), 2)
    assert result.tolist() == [[2000.0] * 8, [0.0] * 8]


def test_nan_stays_in_its_row() -> None:
    grad, ids = randn(100, 8, seed=0), torch.arange(100) // 20
    grad[30] = float("nan")
    result = embedding_backward(grad, ids, 6)
    assert result.isnan().any(1).tolist() == [False, True, False, False, False, False]


def test_the_table_is_written_once_and_nothing_is_filled() -> None:
    """Four launches, three where all ids are in one block; all but the last write less than the table."""
    for lookups, count in ((12288, 4), (16, 3)):
        launches: list[Launch] = []
        with recording(launches.append, HOPPER):
            embedding_backward(torch.empty(lookups, 768), torch.zeros(lookups, dtype=torch.long), 50304)
        assert len(launches) == count
        sizes = [a.numel() for each in launches[:-1] for a in each.args if isinstance(a, Tensor)]
        assert max(sizes) <= max(50304, 2 * lookups // 16 * 768, lookups * 768)


def test_ids_of_no_row_note_nothing() -> None:
    """What would be their row's is another tensor's memory."""
    keys, places, rows = (torch.zeros(3, dtype=torch.int32) for _ in range(3))
    keys.copy_(torch.tensor([1 * 1024 + 2, 5 * 1024, 5 * 1024 + 1]))  # two of the row past all five
    spans = torch.zeros(6, dtype=torch.int64)
    launch(kernels._rank_kernel, (1,), keys, places, rows, spans, 3, 5, config=kernels._RANK, like=keys)
    assert spans.tolist() == [0, 1 << 32, 0, 0, 0, 0]
    assert (places.tolist(), rows.tolist()) == ([2, 0, 1], [1, 5, 5])


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["burnish.ops.embedding_backward"], "triton_why_not", lambda x: [])
    why_not = op.impls["triton"].why_not
    grad, ids = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    assert not why_not(grad, ids, kernels.MAX_ENTRIES)
    assert why_not(grad, ids, kernels.MAX_ENTRIES + 1) == [
        "2097151 rows are too many for the kernel's keys of 32 bits; 2097150 are not"
    ]
    reasons = why_not(grad, ids, 2, torch.zeros(2, 4).double(), torch.tensor(1.0).double())
    assert [reason.split(" is ")[0] for reason in reasons] == ["table_grad", "scale"]
    assert "an input is empty" in _triton.triton_why_not(grad[:0])


def test_configs_are_distinct() -> None:
    for columns in (1, 33, 96, 128, 768, 2048):
        configs = embedding_backward_configs(columns)
        assert 1 <= len(configs) <= 4
        assert len({str(config) for config in configs}) == len(configs)
