"""Fresh inputs are valid ones."""

from __future__ import annotations

import torch

from burnish.scheduling.calls import ExampleInputs
from burnish.scheduling.fresh_inputs import fresh_inputs


def fresh(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    made = fresh_inputs(ExampleInputs((tensor,)), seed).args[0]
    assert (made.shape, made.dtype, made.device) == (tensor.shape, tensor.dtype, tensor.device)
    return made


def test_ids_stay_within_their_range_and_change():
    ids = torch.tensor([[5, 90, 7, 12], [60, 5, 33, 8]])
    made = [fresh(ids, seed) for seed in range(20)]
    assert all(int(m.min()) >= 5 and int(m.max()) <= 90 for m in made)
    assert len({tuple(m.flatten().tolist()) for m in made}) == 20
    assert {int(v) for m in made for v in m.flatten()} - set(ids.flatten().tolist())


def test_labels_that_are_ignored_stay_labels():
    labels = torch.tensor([[-100, 3, 9, -100, 4]])
    assert {int(v) for seed in range(20) for v in fresh(labels, seed).flatten()} == {-100, 3, 9, 4}


def test_floats_keep_their_range():
    x = torch.rand(3, 40) + 1
    made = fresh(x)
    assert not torch.equal(made, x)
    assert float(made.min()) >= 0.5
    assert float(made.max()) <= float(x.max())
    assert fresh(torch.randn(2, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_what_is_kept():
    additive = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    for tensor in (
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        torch.tensor([[True, False, True]]),
        torch.tensor([[1.0, 0.0, 1.0]]),
        additive,
        torch.tensor([[0.0, -torch.inf, 0.0]]),
        torch.arange(6)[None],
        torch.tensor([0, 3, 5, 9]),
        torch.full((2, 3), 7),
        torch.empty(0, 4),
    ):
        assert torch.equal(fresh(tensor), tensor)


def test_the_same_tensor_stays_the_same_and_the_rest_is_left_alone():
    x = torch.randn(2, 3)
    made = fresh_inputs(ExampleInputs((x, [x, "text"]), {"flag": True, "y": x + 1}), 3)
    assert made.args[0] is made.args[1][0]
    assert made.args[1][1] == "text"
    assert made.kwargs["flag"] is True
    assert made.kwargs["y"] is not made.args[0]
    again = fresh_inputs(ExampleInputs((x, [x, "text"]), {"flag": True, "y": x + 1}), 3)
    assert torch.equal(again.kwargs["y"], made.kwargs["y"])
