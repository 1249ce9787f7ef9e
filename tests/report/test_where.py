"""The module and the source line of a node."""

from __future__ import annotations

import pytest
from torch import fx

from burnish.report.where import modules_of, path_of, source_of

TRACE = """File "/home/me/model.py", line 12, in forward
    x = self.block(x)
File "/home/me/site-packages/other/layers.py", line 34, in forward
    return self.up(x) [0]
File "{torch}/nn/modules/linear.py", line 134, in forward
    return F.linear(input, self.weight, self.bias)
"""


def node(**meta: object) -> fx.Node:
    made = fx.Graph().call_function(len, ())
    made.meta.update(meta)
    return made


@pytest.fixture
def trace() -> str:
    from burnish.report.where import _TORCH

    return TRACE.replace("{torch}", _TORCH)


def test_the_source_is_the_innermost_line_outside_of_torch(trace: str) -> None:
    source = source_of(node(stack_trace=trace))
    assert (source.place, source.code) == ("layers.py:34", "return self.up(x) [0]")


def test_torchs_own_line_where_there_is_no_other(trace: str) -> None:
    inner = "\n".join(trace.splitlines()[4:])
    assert source_of(node(stack_trace=inner)).place == "linear.py:134"
    assert source_of(node()).place == ""


def test_modules() -> None:
    stack = {
        "": ("", "pkg.Model"),
        "h": ("h.0@1", "pkg.sub.Block"),
        "x": ("_", "_empty_nn_module_stack_from_metadata_hook"),
    }
    assert modules_of(node(nn_module_stack=stack)) == [("", "Model"), ("h.0", "Block")]
    assert path_of(node(nn_module_stack=stack)) == "h.0"
    assert path_of(node()) == ""
