"""The original as it was before packing: the same values and layouts, and no more memory than that takes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from burnish import as_given
from burnish.as_given import AsGiven


def transposed(weight: nn.Parameter) -> None:
    weight.data = weight.data.t().contiguous().t()


def test_only_what_has_changed_is_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    given = AsGiven(model)
    assert (given.is_changed, given.copied()) == (False, None)
    transposed(model[0].weight)
    copied = given.copied()
    assert given.is_changed
    assert copied is not None
    assert copied[0].weight.stride() == (4, 1)
    assert model[0].weight.stride() == (1, 6), "the model stays as it is"
    assert copied[0].bias is model[0].bias
    assert copied[2].weight is model[2].weight
    x = torch.randn(3, 4)
    torch.testing.assert_close(copied(x), model(x))


def test_weights_are_stored_again_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    given, values = AsGiven(model), [weight.detach().clone() for weight in model.parameters()]
    assert not given.restore()
    transposed(model[0].weight)
    model[1].weight = nn.Parameter(torch.zeros(4, 6))  # replaced since: nothing is known of it
    assert given.restore()
    assert not given.is_changed
    assert model[0].weight.stride() == (4, 1)
    assert torch.equal(model[0].weight, values[0])


def test_what_cannot_be_copied_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 6)
    given = AsGiven(model)
    transposed(model.weight)
    model.lock = threading.Lock()  # type: ignore[assignment]
    assert given.copied() is None
    del model.lock
    assert given.copied() is not None
    monkeypatch.setattr(as_given, "_MOST_BYTES", 95)
    assert given.copied() is None
