"""`annotate`: notes on modules."""

from __future__ import annotations

import pytest

import burnish
from tests.scheduling.models import Attention


def test_notes_are_read_again_and_survive_other_steps():
    sch = burnish.create_schedule(Attention())
    sch["proj"].annotate("stage", 1)
    sch["proj"].annotate("why", "slow")
    sch["proj"].trace()
    assert sch["proj"].annotations == {"stage": 1, "why": "slow"}
    assert sch["self_attn"].annotations == {}
    sch.undo(2)
    assert sch["proj"].annotations == {"stage": 1}


def test_refusals():
    model = Attention()
    sch = burnish.create_schedule(model)
    with pytest.raises(ValueError, match="the name must be a text that is not empty, got ''"):
        sch.annotate("", 1)
    model.annotations = 3
    with pytest.raises(ValueError, match="Attention has an attribute 'annotations' of its own"):
        burnish.create_schedule(model).annotate("a", 1)
