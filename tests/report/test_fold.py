"""Which layers fold, and where everything else goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import fx

from burnish.report.fold import Folding, Place

LAYER = ("norm", "mlp.up", "mlp.down")


def nodes(calls: Sequence[tuple[str, str]]) -> list[fx.Node]:
    """Nodes of (path, name of the call), each with the modules that it is in."""
    graph, found = fx.Graph(), []
    for path, call in calls:
        node = graph.call_function(len, (), name=call)
        parts = path.split(".") if path else []
        prefixes = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
        node.meta["nn_module_stack"] = {p: (p, f"pkg.{(p.rpartition('.')[2] or 'model').title()}") for p in prefixes}
        node.meta["call"] = call
        found.append(node)
    return found


def fold(calls: Sequence[tuple[str, str]]) -> Folding:
    return Folding(nodes(calls), lambda node: None if node.meta["call"] == "view" else node.meta["call"])


def layers(prefix: str, *numbers: int, call: str = "x") -> list[tuple[str, str]]:
    return [(f"{prefix}.{number}.{part}", call) for number in numbers for part in LAYER]


def paths(folding: Folding) -> list[tuple[str, int]]:
    return [(block.path, len(block.paths)) for block in folding.blocks]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("a.b", "x"), ("", "y"), ("c", "z")], [("", 1)]),
        (
            [("embed", "x"), *layers("h", 0, 1, 2), ("norm", "y"), ("", "z")],
            [("embed", 1), ("h.*", 3), ("norm", 1), ("", 1)],
        ),
        (
            [("m.embed.word", "x"), ("m", "y"), *layers("m.h", 0, 1), ("head", "z")],
            [("m.embed", 1), ("m", 1), ("m.h.*", 2), ("head", 1)],
        ),
        # Of layers that differ, those that are alike.
        ([*layers("h", 0, call="first"), *layers("h", 1, 2, 3, 5)], [("h.0", 1), ("h.1-3,5", 4)]),
        ([*layers("h", 0), *layers("h", 1, call="y")], [("h.0", 1), ("h.1", 1)]),
        # The outermost layers that are alike: stages of blocks are not, the blocks in them are.
        (
            [*layers("s.0.b", 0, 1), *layers("s.1.b", 0, 1, 2)],
            [("s.0.b.*", 2), ("s.1.b.*", 3)],
        ),
        ([*layers("h.0.e", 0, 1), *layers("h.1.e", 0, 1)], [("h.*", 2)]),
        # A product and its activation are no layers.
        ([("net.0", "x"), ("net.1", "x"), ("net.2", "x")], [("", 1)]),
    ],
)
def test_blocks(calls: list[tuple[str, str]], expected: list[tuple[str, int]]) -> None:
    assert paths(fold(calls)) == expected


def test_views_do_not_keep_layers_apart() -> None:
    calls = [("h.0.norm", "view"), *layers("h", 0, 1)]
    assert paths(fold(calls)) == [("h.*", 2)]


def test_places() -> None:
    folding = fold([("embed.word", "x"), *layers("h", 0, 1)])
    assert folding.place("embed.word") == Place(0, 0, "word")
    assert folding.place("h.1.mlp.up") == Place(1, 1, "mlp.up")
    assert folding.place("h.1") == Place(1, 1, "")
    assert folding.place("head") == Place(2, 0, "")
    assert [block.kind for block in folding.blocks] == ["Embed", "0", ""]
