"""The Op calls of a Program, and what each has to say to become the call of an ONNX function.

An ONNX function has no branches that its caller could choose between: a product with a bias and one without are two
functions, and so are two settings. A `Signature` is all that decides: the Op, its settings, and dtype and sizes of each
tensor. Sizes are numbers, or, where they are free in the model, letters that stand for one number wherever they occur.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.lower import op_of
from burnish.op import Op

Sizes: TypeAlias = "tuple[int | str, ...]"

# What these compute is written without naming a size. So any will do to write it, and fixed ones take torch's exporter
# a fraction of the time.
_NAME_NO_SIZE = (
    "add_layer_norm",
    "add_rms_norm",
    "embedding_layer_norm",
    "gated_mlp",
    "layer_norm",
    "linear",
    "rms_norm",
)
_OF_TRAINING = ("dropout_p",)  # 0 in inference
_TABLES_AS_THEY_WERE = (torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, operator.getitem)


@dataclass(frozen=True)
class Signature:
    """What an Op's ONNX function depends on.

    Attributes:
        op: the Op's name.
        settings: its arguments that are no tensors, by name, without those that are None.
        tensors: of each tensor argument name, dtype and sizes.
        results: how many results there are that are no empty tensors.
        halves_alike: of a rotation, whether the second half of its tables repeats the first.
    """

    op: str
    settings: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[str, torch.dtype, Sizes], ...]
    results: int
    halves_alike: bool = False

    def setting(self, name: str) -> Any:
        return dict(self.settings).get(name)

    def examples(self) -> tuple[Tensor, ...]:
        """Tensors like these, each letter a number of its own above 1; they take no memory."""
        numbers: dict[str, int] = {}

        def number(size: int | str) -> int:
            return size if isinstance(size, int) else numbers.setdefault(size, 3 + 2 * len(numbers))

        return tuple(
            torch.zeros((), dtype=dtype).expand([number(size) for size in sizes]) for _, dtype, sizes in self.tensors
        )

    def free(self) -> tuple[dict[int, Any], ...]:
        """Which dims of each tensor are free, as `torch.export` wants to hear it."""
        auto, fixed = torch.export.Dim.AUTO, self.op in _NAME_NO_SIZE
        return tuple(
            {dim: auto for dim, size in enumerate(sizes) if isinstance(size, str) and not fixed}
            for _, _, sizes in self.tensors
        )


@dataclass(frozen=True)
class Call:
    """A node that calls an Op. module: the path of the module that it belongs to, where that is known, else ""."""

    node: fx.Node
    op: Op
    signature: Signature
    module: str


def calls_of(graph: fx.Graph, prefix: str = "") -> list[Call]:
    """The graph's Op calls, in order; paths of modules without the prefix."""
    return [
        Call(node, op, _signature(node, op), _module(node).removeprefix(prefix))
        for node in graph.nodes
        if (op := op_of(node.target)) is not None
    ]


def _signature(node: fx.Node, op: Op) -> Signature:
    given = dict(zip(op.signature.parameters, op.bind(*node.args, **node.kwargs), strict=True))
    letters: dict[str, str] = {}

    def size(dim: int | torch.SymInt) -> int | str:
        if isinstance(dim, int) or dim.node.expr.is_number:
            return int(dim)
        return letters.setdefault(str(dim), chr(ord("a") + len(letters)))

    tensors = []
    for name, argument in given.items():
        if isinstance(argument, fx.Node):
            value = argument.meta["val"]
            tensors.append((name, value.dtype, tuple(map(size, value.shape))))
    settings = tuple(
        (name, _setting(a))
        for name, a in given.items()
        if a is not None and not isinstance(a, fx.Node) and name not in _OF_TRAINING
    )
    value = node.meta["val"]
    results = sum(tuple(result.shape) != (0,) for result in (value if isinstance(value, tuple) else (value,)))
    tables = [given[name] for name in ("cos", "sin") if name in given]
    return Signature(op.name, settings, tuple(tensors), results, bool(tables) and all(map(_halves_alike, tables)))


def _setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _halves_alike(table: fx.Node) -> bool:
    """Whether it comes from `rope_tables`, which has each angle twice."""
    while table.target in _TABLES_AS_THEY_WERE:
        table = table.args[0]  # type: ignore[assignment]
    return table.target is ops.rope_tables.overload


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return path.removeprefix("L['self']").removeprefix(".")
