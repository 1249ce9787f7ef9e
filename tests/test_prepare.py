"""What makes the caller's structure of the flat outputs."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from burnish.prepare import _unflatten

X, Y = torch.zeros(2), torch.ones(3)


class Pair(NamedTuple):
    first: Any
    second: Any


class Bag(list[Any]):
    """A container of a class that is registered, and that keeps the very list it is made from."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.items = items


pytree.register_pytree_node(Bag, lambda bag: (list(bag), "context"), lambda items, context: Bag(items))


@pytest.mark.parametrize(
    ("tree", "is_direct"),
    [
        *((X, False), ((X,), True), ((X, None, 3), True), ([X, Y], True), ((), True), ({"a": X, "b": None}, True)),
        *((Pair(X, Y), True), (collections.OrderedDict(b=X, a=Y), True), (Bag([X, Y]), True)),
        *(((X, (Y, X)), False), ({"a": [X], "b": Y}, False), ((X, ()), False)),
    ],
)
def test_unflatten_makes_what_the_spec_makes(tree: Any, is_direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    expected = spec.unflatten(leaves)
    if is_direct:
        monkeypatch.delattr(pytree.TreeSpec, "unflatten")
    made = _unflatten(spec)(leaves)
    assert type(made) is type(expected) is type(tree)
    assert pytree.tree_structure(made) == spec
    assert all(a is b for a, b in zip(pytree.tree_leaves(made), leaves, strict=True))


def test_unflatten_gives_away_no_list_of_its_callers() -> None:
    leaves, spec = pytree.tree_flatten(Bag([X, Y]))
    assert _unflatten(spec)(leaves).items is not leaves
    assert _unflatten(spec)(tuple(leaves)).items == leaves


def test_unflatten_of_a_models_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tree = outputs.BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=Y)
    leaves, spec = pytree.tree_flatten(tree)
    made = _unflatten(spec)(leaves)
    assert type(made) is type(tree)
    assert made.last_hidden_state is made[0] is X
    assert made.pooler_output is made[1] is Y
    assert list(made) == list(tree)
    assert list(vars(made)) == list(vars(tree))
