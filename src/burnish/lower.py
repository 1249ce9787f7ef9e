"""Program -> `Executable`: one generated function in which every Op node is a slot that an Impl's plain callable fills.

The code is generated once for a Program. What differs from one input signature to the next is only which Impl stands in
which slot, so that a new batch or sequence size costs a dictionary, not a compilation.
"""

from __future__ import annotations

import builtins
import operator
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from burnish.op import OPS, Op
from burnish.parallel.graphs import is_all_reduce
from burnish.places import find_weight


class Slot:
    """The place of one Op node in the generated code. Calling it runs the Op's reference, so that unbound code is right
    too. `in_place`: all that the Op donates are inputs of the model that nothing else reads, a KV cache's; or, of an
    Op that sums over ranks, fresh memory of which the same holds. `is_told`: calls have the keyword `live_rows`, too
    (see `Impl`)."""

    def __init__(self, name: str, op: Op, origin: str, in_place: bool, is_told: bool = False) -> None:
        self.name = self.__name__ = self.__qualname__ = name
        self.__module__ = "burnish.slots"
        self.op = op
        self.origin = origin
        self.in_place = in_place
        self.is_told = is_told

    def __call__(self, *args: Any, live_rows: Tensor | None = None) -> Any:
        return self.op.reference(*args)


class Executable:
    """The generated code of one Program.

    Args:
        told: Op nodes that are told the last entry of the input `offsets` as `live_rows`.

    Attributes:
        slots: every Op node's slot, in the order of execution.
        weights: where the weights are read from, in the order in which `bind(...)` takes them.
        donated: which of the flat inputs are written to.
        borrowed: which of the flat outputs are inputs, as they came in or written to.
        source: the generated Python, for reading.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        model: nn.Module | None = None,
        told: Collection[fx.Node] = (),
        offsets: str = "",
    ) -> None:
        graph, self.slots, paths = _slotted(graph_module, told, offsets)
        self.donated, self.borrowed = _shared(graph, len(paths))
        self.weights = [
            find_weight((model, graph_module) if model is not None else (graph_module,), path) for path in paths
        ]
        code = graph.python_code("self")
        self.source = code.src
        self._globals = dict(code.globals)
        self._global_names = {id(value): name for name, value in code.globals.items() if isinstance(value, Slot)}
        namespace = dict(self._globals)
        exec(
            compile(self.source, f"<burnish {type(graph_module).__name__}>", "exec"), namespace
        )  # fx's own generated code
        self._code: types.CodeType = namespace["forward"].__code__

    def bind(self, chosen: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
        """A function `(weights, leaves) -> output leaves` that calls `chosen[slot.name]` in each slot (the reference
        where absent)."""
        namespace = {"__builtins__": builtins, **self._globals}  # torch.compile looks for these
        for slot in self.slots:
            if slot.name in chosen:
                namespace[self._global_names[id(slot)]] = chosen[slot.name]
        function = types.FunctionType(self._code, namespace)
        return lambda weights, leaves: function(None, *weights, *leaves)

    def read_weights(self) -> list[Tensor]:
        return [place.owner[place.name] for place in self.weights]


def op_of(target: Any) -> Op | None:
    """The Op whose overload a node calls, if it is one."""
    return OPS.get(target._opname) if getattr(target, "namespace", None) == "burnish" else None


def _slotted(
    graph_module: fx.GraphModule, told: Collection[fx.Node], offsets: str
) -> tuple[fx.Graph, list[Slot], list[str]]:
    """A copy of the graph with Op nodes calling slots, each weight a leading placeholder, and counts taken first."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    weight_nodes: dict[str, fx.Node] = {}
    nodes = _counts_first(graph_module.graph)
    for node in nodes:
        if node.op == "get_attr":
            if node.target not in weight_nodes:
                weight_nodes[node.target] = graph.placeholder(f"w{len(weight_nodes)}_{node.name}")
            mapping[node] = weight_nodes[node.target]
    slots: list[Slot] = []
    live_rows = None
    for node in nodes:
        if node.op == "get_attr":
            continue
        if told and live_rows is None and node.op != "placeholder":
            given = next(new for old, new in mapping.items() if old.op == "placeholder" and old.target == offsets)
            live_rows = graph.call_function(operator.getitem, (given, slice(-1, None)))
        op = op_of(node.target) if node.op == "call_function" else None
        new = graph.node_copy(node, lambda n: mapping[n])
        if op is not None:
            slot = Slot(f"{op.name}_{len(slots)}", op, node.name, _may_write(node, op), node in told)
            slots.append(slot)
            new.target = slot
            args = op.bind(*new.args, **new.kwargs)
            new.args = tuple(_settled(graph, arg, i in op.weights) for i, arg in enumerate(args))
            new.kwargs = {"live_rows": live_rows} if slot.is_told else {}
        elif (fast := METHOD_OF.get(node.target)) is not None:
            new.target = fast
        elif is_all_reduce(node) and _is_read_once(node.args[0]):
            from burnish.parallel.collectives import all_reduce_in_place

            new.target = all_reduce_in_place
        mapping[node] = new
    return graph, slots, list(weight_nodes)


def _counts_first(graph: fx.Graph) -> list[Any]:
    """The nodes in the order of execution: what only takes numbers from inputs, such as one more than the length of a
    cache, comes before the rest. On CUDA a kernel of PyTorch between those of Ops would have the next one wait to be
    launched (see `burnish.kernels.launch`)."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    early = set(inputs)
    for node in graph.nodes:
        found = node.meta.get("val")
        is_number = not isinstance(found, Tensor) or found.dim() == 0
        if node.op == "call_function" and op_of(node.target) is None and is_number:
            early |= {node} if node.all_input_nodes and early.issuperset(node.all_input_nodes) else set()
    first = [node for node in graph.nodes if node in early]
    return [*first, *(node for node in graph.nodes if node not in early)]


def _may_write(node: fx.Node, op: Op) -> bool:
    """Whether nothing but the node reads what its Op donates; who asks for a size reads nothing."""
    args = op.bind(*node.args, **node.kwargs)
    given = [args[i] for i in op.donates]
    readers = {user for arg in given for user in arg.users if user.target is not torch.ops.aten.sym_size.int}
    may = _is_read_once if "group_name" in op.signature.parameters else _is_input
    return bool(given) and readers == {node} and all(map(may, given))


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _is_read_once(node: Any) -> bool:
    """Whether this is a tensor that an Op leaves in fresh memory, for one reader."""
    return op_of(node.target) is not None and isinstance(node.meta.get("val"), Tensor) and len(node.users) == 1


def _shared(graph: fx.Graph, weights: int) -> tuple[frozenset[int], frozenset[int]]:
    """`donated` and `borrowed` of an Executable."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][weights:]
    slots = [node for node in nodes if isinstance(node.target, Slot) and node.target.in_place]
    written = [node.args[i] for node in slots for i in node.target.op.donates]
    changed = {
        (node, result) for node in slots for i, result in node.target.op.donates.items() if node.args[i] in inputs
    }
    (outputs,) = nodes[-1].args

    def is_borrowed(output: Any) -> bool:
        if not isinstance(output, fx.Node) or output in inputs:
            return isinstance(output, fx.Node)
        return output.target is operator.getitem and tuple(output.args) in changed

    donated = frozenset(i for i, node in enumerate(inputs) if node in written)
    return donated, frozenset(i for i, output in enumerate(outputs) if is_borrowed(output))


def _settled(graph: fx.Graph, arg: Any, is_weight: bool) -> Any:
    """A weight that an Op computes is copied. Kernels read weights before the kernel ahead of them is done (see
    `burnish.kernels.launch`); after torch's copy, which does not let them start early, that is no harm."""
    source = arg
    while isinstance(source, fx.Node) and source.all_input_nodes and not isinstance(source.target, Slot):
        source = source.all_input_nodes[0]
    if not is_weight or not isinstance(source, fx.Node) or not isinstance(source.target, Slot):
        return arg
    with graph.inserting_after(arg):
        return graph.call_function(torch.clone, (arg,))


# The same functions without the dispatcher's Python-side schema matching: 1.9 us a call against 0.5 us for a view.
METHOD_OF: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.Tensor.reshape,  # a slice of a merged product is strided where its own was not
    torch.ops.aten.reshape.default: torch.Tensor.reshape,
    torch.ops.aten.transpose.int: torch.Tensor.transpose,
    torch.ops.aten.permute.default: torch.Tensor.permute,
    torch.ops.aten.unsqueeze.default: torch.Tensor.unsqueeze,
    torch.ops.aten.expand.default: torch.Tensor.expand,
    torch.ops.aten.sym_size.int: torch.Tensor.size,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.embedding.default: torch.embedding,
}
