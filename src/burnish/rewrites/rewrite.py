"""`Rewrite`: a pattern, what replaces it, and the guard that can refuse with a reason; and `apply`, which runs a list
of them."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from burnish.graph.matcher import Match, Matches, Pattern
from burnish.graph.matcher import NearMiss as Nearest
from burnish.graph.record import Replacement
from burnish.graph.results import compute, results_remembered
from burnish.graph.rewriter import replace_pattern
from burnish.record import NearMiss, StepRecord, together

Examples = Callable[[torch.dtype], tuple[Any, ...]]
Guard = Callable[[Match], "str | None"]


@dataclass(frozen=True)
class Rewrite:
    """One spelling and its replacement, for `burnish.optimize(model, args, rewrites=[...])`. docs/tutorial-new-model.md
    writes one.

    Attributes:
        name: the Op and the spelling, e.g. "rms_norm: weight * normed"; reports call it so.
        pattern: a plain PyTorch function; traced like the model, on `examples(dtype)`.
        replacement: a function of the same parameter names (or some of them) that calls Ops.
        examples: a function of a dtype that makes the inputs that the pattern is traced on; Python scalars among them
            match any value. None for a pattern that calls overloads only, which needs no inputs to be traced.
        guard: a reason to refuse a match, or None. Sees shapes and dtypes through `meta["val"]`.
        anchor: an ATen overload that every match contains, or several; in a graph without them the pattern is neither
            searched nor even traced (the first one that is imports half of torch's compiler, 0.5 s). Without any it is
            searched in every graph.

    Raises:
        TypeError: one of these is no function.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    examples: Examples | None = None
    anchor: Any = ()
    guard: Guard | None = None

    def __post_init__(self) -> None:
        for argument, optional in (("pattern", False), ("replacement", False), ("examples", True), ("guard", True)):
            given = getattr(self, argument)
            if not callable(given) and not (optional and given is None):
                raise TypeError(
                    f"{argument} of the Rewrite {self.name!r}: a function is needed, not {type(given).__name__}"
                )

    def may_match(self, graph: fx.Graph) -> bool:
        wanted = self.anchor if isinstance(self.anchor, tuple) else (self.anchor,)
        return {node.target for node in graph.nodes}.issuperset(wanted)

    def prepared(self, dtype: torch.dtype) -> Pattern:
        """The traced pattern. TypeError, ValueError: it cannot be matched, or the replacement does not fit it."""
        return _prepared(self, dtype)


@functools.lru_cache(maxsize=512)
def _prepared(rewrite: Rewrite, dtype: torch.dtype) -> Pattern:
    try:
        pattern = Pattern.of(rewrite.pattern, rewrite.examples(dtype) if rewrite.examples else None)
        Replacement.of(rewrite.replacement, pattern)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"rewrite {rewrite.name!r}: {error}") from error
    return pattern


@results_remembered()
def apply(
    name: str, rewrites: Iterable[Rewrite | GraphPass], graph_module: fx.GraphModule, watch: Watch | None = None
) -> StepRecord:
    """Runs `rewrites` in order on `graph_module` and records what each did. `watch` is called after each with what it
    found; it may look at the graph, and not change it."""
    started = time.perf_counter()
    record = StepRecord(name, nodes_before=len(graph_module.graph.nodes))
    matches: Counter[str] = Counter()
    misses: list[NearMiss] = []
    nearest: dict[str, tuple[Nearest, NearMiss]] = {}  # of all spellings of an Op
    dtypes = floating_dtypes(graph_module.graph)
    for rewrite in rewrites:
        if isinstance(rewrite, GraphPass):
            outcome = rewrite.run(graph_module)
            matches[rewrite.name] += outcome.count
            misses += [_near_miss(rewrite.name, text) for text in outcome.refused]
            if watch is not None:
                watch(rewrite, outcome, None)
            continue
        if not rewrite.may_match(graph_module.graph):
            continue
        for dtype in dtypes if rewrite.examples else dtypes[:1]:
            pattern = rewrite.prepared(dtype)
            try:
                found = replace_pattern(graph_module, pattern, rewrite.replacement, guard=rewrite.guard)
            except (TypeError, ValueError) as error:  # the Op refuses what the guard let pass: the original stays
                misses.append(NearMiss(rewrite.name, str(error)))
                continue
            matches[rewrite.name] += len(found)
            misses += [_near_miss(rewrite.name, text) for _, text in found.refused]
            if not found and found.near_misses:
                op, miss = family(rewrite.name), found.near_misses[0]
                if op not in nearest or miss.matched > nearest[op][0].matched:
                    nearest[op] = miss, _near_miss(rewrite.name, miss.reason)
            if watch is not None:
                watch(rewrite, found, pattern)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    record.matches = {key: count for key, count in matches.items() if count}
    families, sizes = set(map(family, record.matches)), names_of_sizes(graph_module.graph)
    misses += [told for op, (miss, told) in nearest.items() if not _is_taken(miss, op in families)]
    record.near_misses = together(replace(miss, reason=renamed(miss.reason, sizes.get)) for miss in misses)
    record.nodes_after = len(graph_module.graph.nodes)
    record.seconds = time.perf_counter() - started
    return record


def _near_miss(rewrite: str, text: str) -> NearMiss:
    """Of what a pass or the matcher said: "node: reason", or a reason alone."""
    node, _, reason = text.partition(": ")
    if not reason or not node.isidentifier():
        return NearMiss(rewrite, text)
    return NearMiss(rewrite, reason.removeprefix("guard: "), (node,))


def family(rewrite: str) -> str:
    """Of "attention: softmax, times" the Op, which has other spellings."""
    return rewrite.partition(":")[0]


def _is_taken(miss: Nearest, other_spelling_matched: bool) -> bool:
    """Whether another rewrite took what this one almost matched, so that nothing is missed."""
    return miss.node is not None and (miss.node._erased or (other_spelling_matched and miss.matched <= 1))


def names_of_sizes(graph: fx.Graph) -> dict[str, str]:
    """What the graph's symbols stand for, as the user knows it: "s72" is "input_ids[0]"."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        shape = value(node).shape if node.op == "placeholder" and isinstance(value(node), Tensor) else ()
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                names.setdefault(str(size), f"{node.target}[{dim}]")
    return names


def renamed(text: str, name_of: Callable[[str], str | None]) -> str:
    """`text` with each word that has another name called so."""
    return re.sub(r"[A-Za-z_]\w*", lambda word: name_of(word[0]) or word[0], text)


@dataclass(frozen=True)
class Outcome:
    """How often a pass applied, and where it did not, with the reason."""

    count: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphPass:
    """A rewrite that no fixed pattern can express (any number of siblings, say), or that concerns single nodes."""

    name: str
    run: Callable[[fx.GraphModule], Outcome]


Watch = Callable[[Rewrite | GraphPass, Matches | Outcome, Pattern | None], None]
"""Is told what a rewrite found, after it has changed the graph, and the pattern that was searched, if there is one."""


def rewrite_nodes(
    graph_module: fx.GraphModule,
    target: Any,
    replacement: Callable[..., Any],
    guard: Callable[[fx.Node, dict[str, Any]], str | None] = lambda node, args: None,
) -> Outcome:
    """Replaces each call of the overload `target` by what `replacement(**its arguments by name)` builds from
    proxies."""
    count, refused = 0, []
    for node in [node for node in graph_module.graph.nodes if node.target is target]:
        args = arguments(node)
        reason = guard(node, args) or insert(graph_module, [node], replacement, *args.values())
        if reason:
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def insert(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], build: Callable[..., Any], *args: Any) -> str | None:
    """Puts what `build(*args)` makes of its arguments' proxies in place of `nodes` (one result for each), before the
    first. Where an Op refuses these arguments, the graph stays as it was, and the reason is returned."""
    graph = graph_module.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    last = nodes[0].prev
    with graph.inserting_before(nodes[0]):
        as_proxy: Any = lambda node: fx.Proxy(node, tracer)  # noqa: E731
        results = build(*fx.node.map_arg(args, as_proxy))
    results = results if isinstance(results, tuple) else (results,)
    made = _between(last, nodes[0])
    try:
        for new in made:
            set_value(new)
            new.meta |= {key: nodes[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in nodes[0].meta}
    except (TypeError, ValueError) as error:
        for new in reversed(made):
            graph.erase_node(new)
        return str(error)
    for node, result in zip(nodes, results, strict=True):
        result.node.meta |= {key: entry for key, entry in node.meta.items() if key != "val"}
        node.replace_all_uses_with(result.node)
        graph.erase_node(node)
    return None


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found = []
    while (first := first.next) is not last:
        found.append(first)
    return found


def forget_origin(node: fx.Node) -> None:
    """Says that `node` no longer has the value of the captured node that it came from."""
    node.meta.pop("origin", None)


def set_value(node: fx.Node) -> None:
    """The fake value of a new node, from those of its inputs."""
    if node.op != "call_function":
        return
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode((args, kwargs))
    with mode or contextlib.nullcontext(), torch.no_grad():
        node.meta["val"] = compute(node.target, args, kwargs)  # type: ignore[arg-type]


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an overload, by the schema's names, defaults filled in."""
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def same(a: Any, b: Any) -> bool:
    """Whether two sizes (or lists of sizes) are provably equal, for every size that the graph serves."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return statically_known_true(a == b)


def floating_dtypes(graph: fx.Graph) -> Sequence[torch.dtype]:
    """The dtypes in which this graph multiplies matrices or normalizes, most frequent first."""
    counts: Counter[torch.dtype] = Counter()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            counts[value.dtype] += 1
    return [dtype for dtype, _ in counts.most_common()]


def value(bound: Any) -> Any:
    """The fake tensor of a bound node, or the constant itself."""
    return bound.meta.get("val") if isinstance(bound, fx.Node) else bound


def values(match: Match, *names: str) -> list[Any]:
    """The fake tensors (or constants) that `names` are bound to."""
    return [value(match.bindings[name]) for name in names]
