"""The kernel after the choice of a token, in the interpreter, against the operations that it stands for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels.next_token import next_token


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("may_end", [False, True])
@pytest.mark.parametrize("advance", [False, True])
def test_next_token(batch: int, may_end: bool, advance: bool) -> None:
    chosen, fed = torch.arange(batch) + 3, torch.tensor(6)
    finished, eos = torch.arange(batch) % 3 == 1, torch.tensor([5, 7])
    token, sequences = torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, 20, dtype=torch.int64)[:, :10]
    position = torch.arange(batch)[:, None].clone()
    taken = torch.where(finished, 9, chosen) if may_end else chosen
    ended = finished | torch.isin(taken, eos) if may_end else finished.clone()
    next_token(chosen, finished, eos, token, sequences, fed, position, 9, may_end, advance)
    assert token[:, 0].tolist() == taken.tolist()
    assert torch.equal(finished, ended)
    expected = torch.zeros(batch, 10, dtype=torch.int64)
    expected[:, 7] = taken
    assert torch.equal(sequences, expected)
    assert fed.item() == 6 + advance
    assert torch.equal(position[:, 0], torch.arange(batch) + advance)


def test_without_positions_and_ends() -> None:
    chosen, fed = torch.tensor([4]), torch.tensor(0)
    token, sequences = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    next_token(chosen, torch.zeros(1, dtype=torch.bool), none, token, sequences, fed, None, 0, True, True)
    assert (token.item(), sequences.tolist(), fed.item()) == (4, [[0, 4, 0]], 1)
