"""`shard`, `sync`, `tensor_parallel` without ranks; `cut_pipeline_stage`. With two ranks: tests/parallel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from tests.scheduling.models import Attention, Stack
from tests.scheduling.same import fingerprint


def test_ranks_are_needed():
    sch = burnish.create_schedule(nn.Sequential(nn.Linear(4, 4)))
    before = fingerprint(sch.mod)
    for step in (
        lambda: sch["0"].shard("weight", 0),
        lambda: sch["0"].sync("fwd_post", "all_reduce"),
        lambda: sch.tensor_parallel(),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized: start the processes w"):
            step()
    assert fingerprint(sch.mod) == before
    assert sch.history == []


def test_a_stage_ends_once_and_where_there_is_something_to_end():
    sch = burnish.create_schedule(Stack(3), (torch.randn(1, 2, 32),))
    sch["layers.0"].cut_pipeline_stage()
    before = fingerprint(sch.mod)
    for step, said in (
        (lambda: sch["layers.0"].cut_pipeline_stage(), r"a stage ends behind layers\.0 already"),
        (lambda: sch["layers"].cut_pipeline_stage(), "cut_pipeline_stage: layers has no forward"),
        (lambda: sch.cut_pipeline_stage(), "a stage ends behind a submodule"),
    ):
        with pytest.raises(ValueError, match=said):
            step()
    assert fingerprint(sch.mod) == before
    assert torch.equal(sch.build().eval()(torch.ones(1, 2, 32)), sch.original.eval()(torch.ones(1, 2, 32)))


def test_stages_follow_each_other():
    sch = burnish.create_schedule(Attention())
    with pytest.raises(ValueError, match="build_pipeline: give inputs of one microbatch"):
        sch.build_pipeline()
    x = (torch.randn(1, 2, 32),)
    sch["proj"].cut_pipeline_stage()
    sch["proj.dense"].cut_pipeline_stage()
    with pytest.raises(ValueError, match=r"a stage cannot end behind proj and behind proj\.dense, which is in it"):
        sch.build_pipeline(x)
    sch.undo(2)
    with pytest.raises(ValueError, match="build_pipeline: no stage ends anywhere"):
        sch.build_pipeline(x)
