"""Every rewritten node against the float64 oracle, on real activations; and the way back for those that fail.

The captured graph is run once in the model's own dtype: that is eager. Wherever the rewritten graph computes a value
that the captured graph computes too, the nodes that lead to it (a *unit*) are run on eager's own inputs and compared
with eager's value and with the same part of the captured graph in float64. Values are dropped as soon as nothing needs
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from burnish.lower import op_of
from burnish.numerics import Verdict, check
from burnish.rewrites.rewrite import arguments

aten = torch.ops.aten
_CHUNK = 1 << 22  # elements of a weight that are upcast at a time


@dataclass
class Unit:
    """The nodes of the rewritten graph that compute `node`, which the captured graph computes as `origin`."""

    node: fx.Node
    origin: fx.Node
    inner: list[fx.Node]
    inputs: dict[fx.Node, fx.Node]
    verdict: Verdict | None = None

    @property
    def ops(self) -> list[str]:
        return [op.name for node in self.inner if (op := op_of(node.target)) is not None]


@dataclass
class Verification:
    """What was compared. `units` in the order of execution, each with its verdict; `skipped` says why nothing was
    compared."""

    units: list[Unit] = field(default_factory=list)
    skipped: str | None = None

    @property
    def failures(self) -> list[Unit]:
        return [unit for unit in self.units if unit.verdict is not None and not unit.verdict.ok]


def units_of(graph: fx.Graph, captured: fx.Graph) -> list[Unit]:
    """The units of a rewritten graph: one for each shared value that at least one Op leads to."""
    origins = {node.name: node for node in captured.nodes}
    units = []
    for node in graph.nodes:
        origin = origins.get(node.meta.get("origin", ""))
        if origin is None or node.op in ("placeholder", "get_attr", "output"):
            continue
        inner, inputs = _slice(node, lambda n: origins.get(n.meta.get("origin", "")))
        if any(op_of(n.target) is not None for n in inner):
            units.append(Unit(node, origin, inner, inputs))
    return units


def _slice(
    node: fx.Node, origin_of: Callable[[fx.Node], fx.Node | None]
) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """The nodes from the nearest shared values to `node`, in order; and the shared values with their captured
    counterparts."""
    inner: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, fx.Node] = {}

    def visit(current: fx.Node) -> None:
        if current in inner or current in inputs:
            return
        origin = origin_of(current)
        if current is not node and origin is not None and current.op != "get_attr":
            inputs[current] = origin
            return
        for source in current.all_input_nodes:
            visit(source)
        inner[current] = None

    visit(node)
    return list(inner), inputs


def verify(
    graph_module: fx.GraphModule,
    captured: fx.GraphModule,
    leaves: Sequence[Any],
    function_of: Callable[[fx.Node], Callable[..., Any]],
    computed_in: torch.dtype | None = None,
) -> Verification:
    """Compares every unit on what `leaves` (the flat inputs of one real call) make of it, with dropout switched off on
    both sides: random numbers of two kinds of generators cannot be compared.

    Args:
        function_of: the callable that stands for an Op node: the Impl chosen for it.
        computed_in: as of `burnish.numerics.check`.
    """
    if name := random_node(captured.graph, but_dropout=True):
        return Verification(skipped=f"{name} is random")
    units = units_of(graph_module.graph, captured.graph)
    pending: dict[int, list[Unit]] = {}
    order = _positions(captured.graph)
    for unit in units:
        pending.setdefault(_ready(unit, order), []).append(unit)
    last_use = _last_uses(captured.graph, units)
    eager: dict[fx.Node, Any] = {}
    supplied = iter(leaves)
    with torch.no_grad():
        for position, node in enumerate(captured.graph.nodes):
            if node.op == "output":
                break
            eager[node] = next(supplied) if node.op == "placeholder" else _run(node, captured, eager)
            for unit in pending.get(position, ()):
                unit.verdict = _compare(unit, graph_module, captured, eager, function_of, computed_in)
            for done in last_use.get(position, ()):
                eager.pop(done, None)
    return Verification(units)


def _compare(
    unit: Unit,
    graph_module: fx.GraphModule,
    captured: fx.GraphModule,
    eager: dict[fx.Node, Any],
    function_of: Callable[[fx.Node], Callable[..., Any]],
    computed_in: torch.dtype | None,
) -> Verdict:
    env = {node: eager[origin] for node, origin in unit.inputs.items()}
    for node in unit.inner:
        op = op_of(node.target)
        if op is None:
            env[node] = _run(node, graph_module, env)
        else:
            args = pytree.tree_map_only(fx.Node, env.__getitem__, op.bind(*node.args, **node.kwargs))
            env[node] = function_of(node)(*_without_dropout(node.target, args, {})[0])
    known = {origin: _upcast(eager[origin]) for origin in unit.inputs.values()}
    true = _oracle(unit.origin, captured, known, eager)
    return check(env[unit.node], eager[unit.origin], true, computed_in)


def _run(node: fx.Node, graph_module: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return _attribute(graph_module, str(node.target))
    args, kwargs = pytree.tree_map_only(fx.Node, env.__getitem__, (node.args, node.kwargs))
    if _draws_seed(node.target):  # for a dropout that is switched off: no number is drawn that the model would draw
        seed = node.meta["val"]
        return torch.zeros(tuple(map(int, seed.shape)), dtype=seed.dtype, device=seed.device)
    args, kwargs = _without_dropout(node.target, args, kwargs)
    if (op := op_of(node.target)) is not None:  # an Op that capture itself put there: eager is its reference
        return op.reference(*op.bind(*args, **kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _draws_seed(target: Any) -> bool:
    return getattr(target, "overloadpacket", None) in (aten.randint, aten.randint_like)


def _without_dropout(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, in which nothing is dropped."""
    schema = getattr(target, "_schema", None)
    if schema is None or not {"dropout_p", "train"} & {argument.name for argument in schema.arguments}:
        return args, kwargs
    names = [argument.name for argument in schema.arguments]
    name, nothing = ("dropout_p", 0.0) if "dropout_p" in names else ("train", False)
    place = names.index(name)
    if place < len(args):
        return (*args[:place], nothing, *args[place + 1 :]), kwargs
    return args, ({**kwargs, name: nothing} if name in kwargs else kwargs)


def _attribute(graph_module: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def _oracle(node: fx.Node, captured: fx.GraphModule, known: dict[fx.Node, Any], eager: dict[fx.Node, Any]) -> Any:
    """`node` in float64, computed from the values in `known` (which it extends)."""
    if node in known:
        return known[node]
    if node.op == "placeholder":
        known[node] = _upcast(eager[node])
    elif node.op == "get_attr":
        known[node] = _attribute(
            captured, str(node.target)
        )  # upcast where it is used: an embedding table stays as it is
    else:
        for source in node.all_input_nodes:
            _oracle(source, captured, known, eager)
        args, kwargs = pytree.tree_map_only(fx.Node, known.__getitem__, (node.args, node.kwargs))
        known[node] = _call_in_float64(node.target, args, kwargs)
    return known[node]


def _call_in_float64(target: Any, args: Any, kwargs: Any) -> Any:
    if target is aten.embedding.default:
        return _upcast(target(*args, **kwargs))
    if target is aten.linear.default and args[1].numel() > _CHUNK:
        x, weight, *bias = args
        rows = max(1, _CHUNK // weight.shape[1])
        product = torch.cat([_upcast(x) @ _upcast(part).t() for part in weight.split(rows)], dim=-1)
        return product + _upcast(bias[0]) if bias and bias[0] is not None else product
    args, kwargs = pytree.tree_map(_upcast, _without_dropout(target, args, kwargs))
    op = op_of(target)
    if op is not None:
        return op.reference(*op.bind(*args, **kwargs))
    # Attention in float64 lays its result out otherwise than the kernel that the view was captured after.
    return aten.reshape.default(*args, **kwargs) if target is aten.view.default else target(*args, **kwargs)


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return pytree.tree_map(_upcast, value) if isinstance(value, (list, tuple)) else value


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _ready(unit: Unit, position: dict[fx.Node, int]) -> int:
    """After which position in the captured graph the unit has all it is compared by. A fused Op may want more than its
    value's captured node did: values leave Llama's merged product with queries rotated by tables computed later."""
    return max(position[node] for node in (unit.origin, *unit.inputs.values()))


def _last_uses(captured: fx.Graph, units: Iterable[Unit]) -> dict[int, list[fx.Node]]:
    """For each position in the captured graph, the nodes whose value nothing needs after it."""
    position = _positions(captured)
    last = {node: max((position[user] for user in node.users), default=position[node]) for node in captured.nodes}
    for unit in units:
        for node in (*unit.inputs.values(), unit.origin):
            last[node] = max(last[node], _ready(unit, position))
    uses: dict[int, list[fx.Node]] = {}
    for node, where in last.items():
        if node.op != "placeholder":
            uses.setdefault(where, []).append(node)
    return uses


def outputs_in_float64(captured: fx.GraphModule, leaves: Sequence[Any]) -> list[Any]:
    """The captured graph's flat outputs, all of it computed in float64."""
    known: dict[fx.Node, Any] = {}
    supplied = iter(leaves)
    last_use = _last_uses(captured.graph, ())
    with torch.no_grad():
        for position, node in enumerate(captured.graph.nodes):
            if node.op == "placeholder":
                known[node] = _upcast(next(supplied))
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], known.__getitem__))
            else:
                _oracle(node, captured, known, {})
            for done in last_use.get(position, ()):
                known.pop(done, None)
    raise AssertionError("a graph ends with its output")


def check_outputs(
    result: Sequence[Any], original: Sequence[Any], true: Sequence[Any], computed_in: torch.dtype | None = None
) -> Verdict:
    """The rule on a whole model's flat outputs: `result` against the original's and the float64 ones."""
    triples = [leaf for leaf in zip(result, original, true, strict=True) if isinstance(leaf[1], Tensor)]
    columns = [list(column) for column in zip(*triples, strict=True)] if triples else [[], [], []]
    return check(columns[0], columns[1], columns[2], computed_in)


def random_node(graph: fx.Graph, but_dropout: bool = False) -> str | None:
    """The first node whose result differs from run to run, if there is one; or the first that is not for dropout."""
    for node in graph.nodes:
        if but_dropout and _is_for_dropout(node):
            continue
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        bound = arguments(node)
        if bound.get("train", True) and bound.get("p", bound.get("dropout_p", 1.0)):
            return str(node.name)
    return None


_DROPOUT = (aten.dropout.default, aten.scaled_dot_product_attention.default)


def _is_for_dropout(node: fx.Node) -> bool:
    """Whether the node is random for dropout's sake, which can be switched off: it drops, or it draws a seed."""
    if _draws_seed(node.target):
        return all((op := op_of(user.target)) is not None and _seed_of(op, user) is node for user in node.users)
    return node.target in _DROPOUT


def _seed_of(op: Any, node: fx.Node) -> Any:
    given = dict(zip(op.signature.parameters, op.bind(*node.args, **node.kwargs), strict=True))
    return given.get("seed") if "dropout_p" in given else None


def restore(graph_module: fx.GraphModule, captured: fx.GraphModule, unit: Unit) -> None:
    """Puts the captured nodes back in place of a unit's."""
    back = {origin: node for node, origin in unit.inputs.items()}
    placeholders = {node.name: node for node in graph_module.graph.nodes if node.op == "placeholder"}

    def copy(original: fx.Node) -> fx.Node:
        if original not in back:
            if original.op == "placeholder":
                back[original] = placeholders[original.name]
            else:
                for source in original.all_input_nodes:
                    copy(source)
                with graph_module.graph.inserting_before(unit.node):
                    back[original] = graph_module.graph.node_copy(original, back.__getitem__)
                back[original].meta = dict(original.meta)
        return back[original]

    unit.node.replace_all_uses_with(copy(unit.origin))
    graph_module.graph.erase_node(unit.node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
