"""A new token's embeddings: one Op on CUDA for one token of each text; what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.lower import op_of
from burnish.op import Op
from burnish.record import StepRecord
from burnish.rewrites import FUSE, apply
from burnish.rewrites.rewrite import set_value

aten = torch.ops.aten


class Given:
    """Tokens and tables in fake tensors, on a device that need not be there."""

    def __init__(self, tokens: int = 1, device: str = "cuda", positions: int = 3) -> None:
        self.graph = fx.Graph()
        with FakeTensorMode():

            def given(name: str, *shape: int, dtype: torch.dtype = torch.int64) -> fx.Node:
                node = self.graph.placeholder(name)
                node.meta["val"] = torch.empty(shape, device=device, dtype=dtype)
                return node

            self.ids, self.positions = given("ids", 3, tokens), given("positions", positions, tokens)
            self.word, self.position = (given(n, 50, 8, dtype=torch.bfloat16) for n in ("word", "position"))
            self.other = given("other", 50, 8, dtype=torch.float32)
            self.lengths = given("lengths")
        self.device = device

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target.overload if isinstance(target, Op) else target, args, kwargs)
        set_value(node)
        return node

    def embedding(self, table: fx.Node, ids: fx.Node) -> fx.Node:
        return self.call(aten.embedding.default, table, ids)

    def fused(self, *outputs: fx.Node) -> StepRecord:
        self.graph.output(outputs)
        record = apply("fuse", FUSE, fx.GraphModule({}, self.graph))
        self.graph.lint()
        return record

    @property
    def made(self) -> list[tuple[str, tuple[Any, ...]]]:
        found = ((op_of(node.target), node) for node in self.graph.nodes)
        return [(op.name, op.bind(*node.args, **node.kwargs)) for op, node in found if op is not None]


def test_of_one_table() -> None:
    given = Given()
    assert given.fused(given.embedding(given.word, given.ids)).matches == {"token embedding": 1}
    assert given.made == [("embedding", (given.ids, given.word, None, None))]


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("words_first", [True, False])
def test_of_two_tables(words_first: bool, positions: int) -> None:
    given = Given(positions=positions)
    sides = [given.embedding(given.word, given.ids), given.embedding(given.position, given.positions)]
    total = given.call(aten.add.Tensor, *(sides if words_first else sides[::-1]))
    assert given.fused(total).matches == {"token embedding": 1}
    words, places = (given.ids, given.word), (given.positions, given.position)
    first, second = (words, places) if words_first or positions == 1 else (places, words)
    assert given.made == [("embedding", (*first, *second))]


def test_a_position_that_is_the_length() -> None:
    given = Given()
    range_ = given.graph.call_function(aten.arange.default, (1,))  # a CPU's PyTorch cannot call it for another device
    range_.meta["val"] = given.lengths.meta["val"].expand(1)
    positions = given.call(aten.unsqueeze.default, given.call(aten.add.Tensor, range_, given.lengths), 0)
    sides = given.embedding(given.word, given.ids), given.embedding(given.position, positions)
    record = given.fused(given.call(aten.add.Tensor, *sides))
    assert record.matches == {"token embedding": 1, "position from length": 1}
    ((_, (_, _, place, _)),) = given.made
    assert (place.target, place.args) == (aten.view.default, (given.lengths, [1, 1]))


def test_what_else_is_read_stays() -> None:
    given = Given()
    words = given.embedding(given.word, given.ids)
    total = given.call(aten.add.Tensor, words, given.embedding(given.position, given.positions))
    assert given.fused(total, words).matches == {"token embedding": 2}
    assert [args[2:] for _, args in given.made] == [(None, None)] * 2


def test_what_is_no_sum_of_tables() -> None:
    given = Given()
    words, places = given.embedding(given.word, given.ids), given.embedding(given.position, given.positions)
    twice = given.call(aten.add.Tensor, words, places, alpha=2)
    of_another_dtype = given.call(
        aten.add.Tensor, given.embedding(given.other, given.ids), given.embedding(given.word, given.positions)
    )
    assert given.fused(twice, of_another_dtype).matches == {"token embedding": 4}


@pytest.mark.parametrize("given", [Given(tokens=2), Given(device="cpu")], ids=["two tokens", "on the CPU"])
def test_what_is_left_alone(given: Given) -> None:
    assert not given.fused(given.embedding(given.word, given.ids)).matches
