"""What makes the caller's structure of the flat outputs."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from burnish.outputs import unflattener

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
    made = unflattener(spec)(leaves)
    assert type(made) is type(expected) is type(tree)
    assert pytree.tree_structure(made) == spec
    assert all(a is b for a, b in zip(pytree.tree_leaves(made), leaves, strict=True))


def test_unflatten_gives_away_no_list_of_its_callers() -> None:
    leaves, spec = pytree.tree_flatten(Bag([X, Y]))
    assert unflattener(spec)(leaves).items is not leaves
    assert unflattener(spec)(tuple(leaves)).items == leaves


def test_unflatten_of_a_models_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tree = outputs.BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=Y)
    make = unflattener(pytree.tree_structure(tree))
    for first, second in ((X, Y), (Y, X), (X, Y)):  # the first is the constructor's, the others are filled in
        made = make([first, second])
        assert type(made) is type(tree)
        assert made.last_hidden_state is made[0] is made["last_hidden_state"] is first
        assert made.pooler_output is made[1] is second
        assert made.to_tuple() == (first, second)
        assert list(made) == list(tree)
        assert list(vars(made)) == list(vars(tree))
        assert made.hidden_states is None
        made.hidden_states = 1  # of this one alone


class Record(collections.OrderedDict[str, Any]):
    """As Hugging Face's: fields that are not None are entries, too."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class Plain(Record):
    first: Any = None
    second: Any = None


@dataclasses.dataclass
class Counting(Plain):
    """Whose constructor does more than to store."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = len(self)


for _record in (Plain, Counting):
    pytree.register_pytree_node(
        _record,
        lambda record: (list(record.values()), [*record]),
        lambda leaves, keys, r=_record: r(**dict(zip(keys, leaves, strict=True))),
    )


@pytest.mark.parametrize("record", [Plain, Counting])
def test_records_are_what_their_constructor_makes(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by_constructor = []
    monkeypatch.setattr(record, "__init__", _noting(record.__init__, made_by_constructor))
    make = unflattener(pytree.tree_structure(record(first=X, second=Y)))
    made_by_constructor.clear()
    for leaves in ([X, Y], [Y, X], [X, X]):
        made, expected = make(leaves), record(*leaves)
        assert list(made.items()) == list(expected.items())
        assert vars(made) == vars(expected)
    assert len(made_by_constructor) - 3 == (1 if record is Plain else 3)


def _noting(init: Any, made: list[Any]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    return __init__


def test_a_record_of_which_a_field_is_none() -> None:
    make = unflattener(pytree.tree_structure(Plain(first=X, second=Y)))
    for _ in range(2):
        assert list(make([X, None])) == ["first"]
