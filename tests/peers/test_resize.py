"""Inputs made longer and shorter, by what a Program knows of their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.capture import Program, capture
from burnish.peers.resize import axis_of, resized


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
        return (mask @ x) * tables[0] * scale + tables[1]


def captured(args: tuple[Any, ...]) -> tuple[Program, tuple[Any, ...]]:
    return capture(Masked().eval(), args), args


def test_every_dim_of_the_sequence_follows() -> None:
    x, mask = torch.randn(2, 5, 4), torch.randn(2, 5, 5)
    program, args = captured((x, mask, (torch.randn(5, 4), torch.randn(1, 5, 4)), 2.0))
    axis = axis_of(program, args, {})
    assert axis is not None
    assert (axis.name, axis.size) == ("tokens", 5)
    for size in (3, 12):
        new, kwargs = resized(program, args, {}, axis, size)
        shapes = [tuple(tensor.shape) for tensor in (*new[:2], *new[2])]
        assert shapes == [(2, size, 4), (2, size, size), (size, 4), (1, size, 4)]
        assert (new[3], kwargs) == (2.0, {})
        assert torch.equal(new[0][:, : min(size, 5)], x[:, :size])
    assert torch.equal(resized(program, args, {}, axis, 12)[0][0][:, 5:10], x)  # repeated
    assert x.shape == (2, 5, 4)


def test_rows_where_nothing_else_is_free() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    program = capture(linear, (x,))
    axis = axis_of(program, (x,), {})
    assert axis is not None
    assert axis.name == "rows"
    (new,), _ = resized(program, (x,), {}, axis, 7)
    assert new.shape == (7, 4)


def test_nothing_is_free() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3, 4)

    x = torch.randn(3, 4)
    assert axis_of(capture(Fixed(), (x,)), (x,), {}) is None


def test_a_size_that_the_model_does_not_take() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[: x.shape[1]]

    x = torch.randn(2, 5, 4)
    program = capture(Positions(), (x,))
    axis = axis_of(program, (x,), {})
    assert axis is not None
    with pytest.raises(ValueError, match=r"the model does not take 9 tokens: .* is outside"):
        resized(program, (x,), {}, axis, 9)
