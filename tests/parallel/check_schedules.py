"""Schedules of divided models: verified by all ranks together, undone, and as a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import ScheduleGPipe

import burnish
from burnish import numerics
from burnish.parallel.shard import shard_of
from burnish.scheduling import VerificationError
from tests.parallel.check_by_hand import mlp
from tests.parallel.models import IDS, MODELS, Whole
from tests.parallel.ranks import RANKS
from tests.scheduling.same import fingerprint
from tests.zoo.case import hidden


def divided_step_by_step(rank: int, folder: Path) -> None:
    """Each rank holds its slices, the model that was given stays whole, and undo gives back whole parameters."""
    model = mlp().train()
    before = fingerprint(model)
    sch = burnish.create_schedule(model, (hidden(2, 4, 16, torch.float32),))
    scheduled = fingerprint(sch.mod)
    with sch.verified():
        sch["0"].shard("weight", axis=0)
        sch["0"].shard("bias", axis=0)
        sch["0"].sync("bwd_post", "all_reduce")
        sch["2"].shard("weight", axis=-1)
        sch["2"].sync("fwd_post", "all_reduce")
    assert [step.verified for step in sch.history] == [False] * 4 + [True]
    assert "1 output and 4 gradients on 3 inputs in train mode" in sch.history[-1].numerics[0]
    assert sch.mod[0].weight.shape == (32 // RANKS, 16)
    assert type(sch.mod[2]).__name__ == "RowParallelLinear"
    assert fingerprint(model) == before
    sch["1"].replace(nn.GELU(approximate="tanh"))
    with pytest.raises(VerificationError, match=r"^step 6, replace in 1: output is wrong"):
        sch.verify()
    sch.undo(6)
    assert fingerprint(sch.mod) == scheduled
    assert sch.mod[0].weight is model[0].weight


def a_missing_sync_is_named(rank: int, folder: Path) -> None:
    sch = burnish.create_schedule(mlp().eval(), (hidden(2, 4, 16, torch.float32),))
    sch["1"].trace()
    sch["0"].shard("weight", axis=0)
    sch["0"].shard("bias", axis=0)
    with pytest.raises(VerificationError, match=r"^step 2, shard in the model|^steps 2 to 3, shard: the call is wrong"):
        sch.verify()
    sch["2"].shard("weight", axis=1)
    message = (
        r"^step 4, shard in 2: a sync is missing: 2: its weight is divided along its inputs; "
        r"sync\('fwd_post', 'all_reduce'\) sums the parts$"
    )
    with pytest.raises(VerificationError, match=message) as error:
        sch.verify()
    assert (error.value.number, error.value.right) == (4, 1)
    sch["2"].sync("fwd_post", "all_reduce")
    sch.verify()
    sch.mod.train()
    with pytest.raises(VerificationError, match=r"^step 2, shard in 0: a sync is missing: 0: .*'bwd_post'"):
        sch.verify()
    sch.undo(5)
    sch.mod.eval()

    def without_sync() -> None:
        with sch.verified():
            for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
                sch.shard(name, axis)

    before = fingerprint(sch.mod)
    with pytest.raises(VerificationError, match=r"^step 3, shard in the model: a sync is missing: 2: "):
        without_sync()
    assert sch.history == []
    assert fingerprint(sch.mod) == before


def wrong_on_one_rank(rank: int, folder: Path) -> None:
    sch = burnish.create_schedule(mlp().eval(), (hidden(2, 4, 16, torch.float32),))
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        sch.shard(name, axis)
    sch["2"].sync("fwd_post", "all_reduce")
    sch.verify()
    sch.replace(Last(sch.mod, 1.01 if rank else 1.0))
    where = "output is wrong" if rank else "the model is wrong: it is wrong on another rank"
    with pytest.raises(VerificationError, match=f"^step 5, replace in the model: {where}"):
        sch.verify()


def dropout_of_divided_features(rank: int, folder: Path) -> None:
    """Each rank drops others of its own: nothing to compare with in train mode, and all ranks see that alike."""
    model = nn.Sequential(*mlp(), nn.Dropout(0.5))
    model[1] = nn.Dropout(0.5)
    sch = burnish.create_schedule(model.train(), (hidden(2, 4, 16, torch.float32),))
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        sch.shard(name, axis)
    sch["0"].sync("bwd_post", "all_reduce")
    sch["2"].sync("fwd_post", "all_reduce")
    found = sch.verify()
    assert found.gradients == 4
    assert found.notes == ["compared in eval mode: its dropout draws other random numbers than the model's"]


class Last(nn.Module):
    """What a rank does alone, behind everything."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, input: torch.Tensor) -> Any:
        return self.inner(input) * self.scale


def refused_before_anything_changes(rank: int, folder: Path) -> None:
    sch = burnish.create_schedule(mlp().train())
    sch["2"].shard("weight", 1)
    sch["2"].sync("fwd_post", "all_reduce")
    before, steps = fingerprint(sch.mod), list(sch.history)
    for refused, message in (
        (lambda: sch["0"].shard("wieght", 0), "shard: 0 has no parameter 'wieght'; it has weight, bias"),
        (lambda: sch["0"].shard("weight", 2), "shard: axis=2 is none of the 2 of weight of 0"),
        (lambda: sch["2"].shard("weight", 0), "shard: weight of 2 is divided already"),
        (lambda: sch["2"].sync("fwd_post", "all_reduce"), "sync: all_reduce at fwd_post of 2 is there already"),
        (lambda: sch["0"].sync("fwd", "all_reduce"), "sync: there is no 'all_reduce' at 'fwd'; there are: fwd_pre"),
        (lambda: sch["0"].sync("bwd_post", "all_reduce", axis=1), "sync: axis=1: all_reduce at bwd_post has none"),
        (lambda: sch.find_all("*").shard("weight", 0), "shard: 1 has no parameter 'weight'; it has none of its own"),
        (lambda: sch.tensor_parallel(), "model: it is divided already"),
        (lambda: sch.quantize(), "quantize: Sequential is in train mode"),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        assert message in str(error.value)
        assert fingerprint(sch.mod) == before
        assert sch.history == steps
    odd = burnish.create_schedule(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"shard: 0\.weight: its size of 3 along axis 0 does not divide among 2"):
        odd["0"].shard("weight", 0)
    with pytest.raises(ValueError, match="plan: Sequential has none, and none of its layers"):
        odd.tensor_parallel()
    assert odd.history == []


def tied_weights_stay_tied(rank: int, folder: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    sch = burnish.create_schedule(model)
    sch["head"].shard("weight", 0)
    assert sch.mod["embed"].weight is sch.mod["head"].weight
    assert sch.mod["head"].weight.shape == (8 // RANKS, 4)
    sch.undo()
    assert sch.mod["embed"].weight is model["embed"].weight


def scheduled_llama(rank: int, folder: Path) -> None:
    """By its own plan, in one step; the original stays whole."""
    whole = Whole(MODELS["llama_tied"])
    model = MODELS["llama_tied"]().train()
    before = fingerprint(model)
    sch = burnish.create_schedule(model)
    scheduled = fingerprint(sch.mod)
    with sch.verified({"input_ids": IDS, "labels": IDS}):
        sch.tensor_parallel()
    assert sch.history[0].matches > 10
    assert len(list(model.parameters())) == int(sch.history[0].numerics[0].split(" and ")[1].split()[0])
    whole.check_logits(sch.build().eval())
    assert fingerprint(model) == before
    assert any(shard_of(p) for p in sch.mod.parameters())
    sch.undo()
    assert fingerprint(sch.mod) == scheduled


def stages_of_a_pipeline(rank: int, folder: Path) -> None:
    """Two ranks compute what one does, microbatch by microbatch."""
    model, x = mlp().eval(), hidden(4, 3, 16, torch.float32)
    sch = burnish.create_schedule(model, (x[:2],))
    with pytest.raises(ValueError, match="build_pipeline: no stage ends anywhere"):
        sch.build_pipeline()
    sch["1"].cut_pipeline_stage()
    pipe = sch.build_pipeline()
    assert pipe.num_stages == 2
    stages = [[name for name, _ in pipe.get_stage_module(i).named_children()] for i in range(2)]
    assert stages == [["0", "1"], ["2"]]
    stage = pipe.build_stage(rank, torch.device("cpu"))
    runner: Any = ScheduleGPipe(stage, 2)
    with torch.no_grad():
        result = runner.step(x) if rank == 0 else runner.step()
        if rank == 1:
            numerics.assert_close(result, model(x), mlp().double()(x.double()))
    dist.barrier()
