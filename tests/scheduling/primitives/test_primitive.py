"""The registry."""

from __future__ import annotations

import inspect

import pytest

from burnish.scheduling import PRIMITIVES, register
from burnish.scheduling.methods import Methods
from burnish.scheduling.primitives import Checkpoint


def test_every_primitive_is_a_documented_method():
    assert {"replace", "replace_all", "fuse", "decompose", "trace", "checkpoint", "annotate"} <= PRIMITIVES.keys()
    for name, primitive in PRIMITIVES.items():
        assert inspect.isfunction(getattr(Methods, name))
        assert primitive.summary().endswith(".")
        assert "\n" not in primitive.summary()


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="primitive 'checkpoint' is registered already"):
        register(Checkpoint)
