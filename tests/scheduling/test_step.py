"""The history, and the Python that replays it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.scheduling import FusedLinears
from tests.scheduling import models
from tests.scheduling.models import Attention, Stack, heads, projection


def test_what_a_step_knows():
    sch = burnish.create_schedule(Attention())
    assert str(sch.history) == "no steps yet"
    step = sch.replace(FusedLinears.with_tail(heads), sch.find(projection))
    assert step is sch.history[0]
    assert (step.primitive, step.path, step.matches) == ("replace", "", 3)
    assert set(step.arguments) == {"new", "match"}
    assert step.added == ("self_attn.FusedLinears_0",)
    assert step.removed == ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
    assert 0 < step.seconds < 60
    sch["proj.dense"].decompose()
    first, second = str(sch.history).splitlines()
    assert first.split()[:6] == ["1", "replace", "the", "model", "3", "matches"]
    assert second.split()[:5] == ["2", "decompose", "proj.dense", "1", "match"]


def replayed(code, model):
    namespace = {"model": model}
    exec(code, namespace)
    return namespace["sch"]


def test_code_replays_it():
    model = Stack(2).eval()
    sch = burnish.create_schedule(model)
    sch.find_all("layers.*").replace(FusedLinears.with_tail(heads), projection)
    sch["layers.0"].replace(models.sdpa, sch["layers.0"].find(models.core_attention))
    sch["layers.1.self_attn"].replace(F.relu, sch["layers.1"].find("dropout")[0])
    sch.find_all("layers.*.proj.dense").decompose()
    sch.fuse(sch.find(models.bias_dropout_residual_norm), "none", name="Tail")
    sch["layers.0"].trace(flatten=True)
    sch["layers.1"].checkpoint()
    sch["layers.1"].annotate("stage", {"number": 1})
    sch.replace_all(nn.LayerNorm, nn.Identity)
    code = sch.code()
    assert 'sch["' not in code
    assert "sch.find_all('layers.*').replace(burnish.scheduling.FusedLinears.with_tail(" in code
    assert "sch.replace_all(torch.nn.LayerNorm, torch.nn.Identity)" in code
    assert "..." not in code
    again = replayed(code, model)
    assert str(again.mod) == str(sch.mod)
    assert again.code() == code
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(again.build()(x), sch.build()(x))


def test_what_cannot_be_written_is_said():
    sch = burnish.create_schedule(Attention())
    sch["self_attn.dropout"].replace(nn.Identity())
    sch.replace_all(nn.Dropout, lambda old: nn.Identity())
    lines = sch.code().splitlines()
    assert lines[-2] == "sch['self_attn.dropout'].replace(...)  # a Identity"
    assert lines[-1].startswith("sch.replace_all(torch.nn.Dropout, ...)  # <lambda> at ")
    assert lines[-1].rpartition(":")[2].isdigit()


def test_single_matches_are_written_by_their_number():
    sch = burnish.create_schedule(Stack(2))
    found = sch.find(models.core_attention)
    sch.replace(models.sdpa, found[1])
    assert sch.code().splitlines()[-1].endswith("models.core_attention)[1])")
