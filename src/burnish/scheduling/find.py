"""What `Schedule.find` takes and returns.

A query is one of
- a regular expression (a string) for the names of submodules: it must match the whole name or the whole path;
- a *pattern*: a function of tensors, or a module, that computes what is looked for (see `burnish.pattern`);
- a *node predicate*: a function of one argument that is called `node` or annotated as `fx.Node`, and says yes or no.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx, nn

from burnish.graph import Found, Match, Pattern, find_in_module, find_matches
from burnish.graph.nested import Blocked, trace_symbolically
from burnish.scheduling.tracer import Known
from burnish.scheduling.tracing import TracedModule, Untraceable, finish, trace_variants, trace_whole
from burnish.scheduling.tree import Tree, join

Query = str | Callable[..., Any] | nn.Module | Pattern
Knowledge = Callable[[nn.Module], Known | None]


@dataclass(frozen=True)
class Origin:
    """Where a result of `find` comes from.

    Attributes:
        base: path of the Schedule that was searched; the parents' paths in the result are relative to it.
        query: what was looked for; `index`: the result's position among all `count` of them.
        modules: by whole path, the modules whose forward makes the result's calls, as they were.
    """

    base: str
    query: Query
    index: int
    count: int
    modules: dict[str, nn.Module]

    def check_fresh(self, tree: Tree) -> None:
        """ValueError where what was found may have changed since."""
        for path, module in self.modules.items():
            if not tree.has(path) or tree.at(path) is not module:
                raise ValueError(
                    f"match: it was found before {path or 'the model'} was changed or moved; find it again"
                )


class Occurrence(list[tuple[str, fx.Node]]):
    """One occurrence of a pattern: for each of its nodes, in graph order, the path of the module that makes the call,
    and the node.

    match: the Match; root: the whole path of the module that was traced; graph: in which the nodes live
    """

    def __init__(self, found: Found, origin: Origin) -> None:
        super().__init__(found)
        self.match = found.match
        self.root = join(origin.base, found.root)
        self.graph = found.graph_module.graph
        self.origin = origin


class Place(tuple[str, Any]):
    """One submodule, or one node: the path of the module that it belongs to, and its name or the node."""

    origin: Origin


class FoundNode(Place):
    """A node that a predicate chose."""

    match: Match
    root: str
    graph: fx.Graph


class FoundModule(Place):
    """A submodule whose name matches; `path` is its whole path."""

    path: str


class Name(str):
    """A submodule's name; printed as it is, like a node's."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


Result = Occurrence | FoundNode | FoundModule


def find(tree: Tree, base: str, query: Query, known: Knowledge) -> list[Any]:
    """All results of a query in the module at `base`: of a pattern in order of computation, else in order of the tree.

    Args:
        known: what is known of the calls of a module.

    Raises TypeError or ValueError in one line for what is no query.
    """
    if isinstance(query, str):
        return _modules_named(tree, base, query)
    if not callable(query) and not isinstance(query, Pattern):
        raise TypeError(
            "find: give a regular expression, a pattern (a function or a module) or a function of a node, "
            f"got {type(query).__name__}"
        )
    if inspect.isclass(query):
        raise TypeError(
            f"find: {query.__name__} is a class; give a module of it as a pattern, or a function of a node that says "
            "yes to what you look for"
        )
    if _is_torchs(query):
        name = getattr(query, "__name__", "f")
        raise ValueError(f"find: write a pattern that calls torch's function, such as lambda x: {name}(x)")
    if not isinstance(query, Pattern) and is_predicate(query):
        return _nodes(tree, base, query, known)
    pattern = Pattern.of(query)
    trace = partial(_trace_as_called, known)
    found = find_in_module(tree.at(base), pattern, trace=trace) or _in_whole_calls(tree.at(base), pattern, known)
    results = []
    for i, each in enumerate(found):
        modules = {path: tree.at(path) for path in {join(base, parent) for parent, _ in each}}
        results.append(Occurrence(each, Origin(base, query, i, len(found), modules)))
    return results


def _trace_as_called(known: Knowledge, root: nn.Module, whole: set[int]) -> fx.GraphModule:
    """As it is called on the example inputs; where that is not known, or does not help, without knowing."""
    call = None
    with contextlib.suppress(Untraceable):
        call = known(root)
    if call is None:
        return trace_symbolically(root, whole)
    try:
        return trace_whole(root, call, whole)
    except Blocked as blocked:
        if blocked.module is not root:
            raise
        return trace_symbolically(root, whole)


def _in_whole_calls(root: nn.Module, pattern: Pattern, known: Knowledge) -> list[Found]:
    """Occurrences that only show where no submodule is inlined: of calls of modules that are not `torch.nn`'s, and in
    modules that can only be traced where it is known how they are called."""
    return [Found(match, path, gm) for path, gm in _graphs(root, known) for match in find_matches(gm, pattern)]


def _is_torchs(query: Any) -> bool:
    """Whether it is a function of torch itself, whose options would become inputs of the pattern."""
    if isinstance(query, (nn.Module, Pattern)):
        return False
    return inspect.isbuiltin(query) or (getattr(query, "__module__", None) or "").partition(".")[0] == "torch"


def is_predicate(query: Any) -> bool:
    """Whether a function says yes or no to a node, instead of computing what is to be found."""
    if isinstance(query, (nn.Module, Pattern)) or not callable(query):
        return False
    parameters = list(inspect.signature(query).parameters.values())
    if len(parameters) != 1:
        return False
    annotation = parameters[0].annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return parameters[0].name == "node" or name.rpartition(".")[2] == "Node"


def _modules_named(tree: Tree, base: str, expression: str) -> list[FoundModule]:
    try:
        wanted = re.compile(expression)
    except re.error as error:
        raise ValueError(f"find: {expression!r} is not a regular expression: {error}") from error
    names = [path for path, _ in tree.at(base).named_modules() if path]
    found = [path for path in names if wanted.fullmatch(path) or wanted.fullmatch(path.rpartition(".")[2])]
    results = []
    for i, path in enumerate(found):
        parent, _, name = path.rpartition(".")
        result = FoundModule((parent, Name(name)))
        result.path = join(base, path)
        result.origin = Origin(base, expression, i, len(found), {result.path: tree.at(result.path)})
        results.append(result)
    return results


def _nodes(tree: Tree, base: str, predicate: Callable[[fx.Node], Any], known: Knowledge) -> list[FoundNode]:
    chosen = [
        (path, gm, node)
        for path, gm in _graphs(tree.at(base), known)
        for node in gm.graph.nodes
        if node.op.startswith("call_") and predicate(node)
    ]
    results = []
    for i, (path, gm, node) in enumerate(chosen):
        result = FoundNode((path, node))
        modules = {str(node.target): str(node.target)} if node.op == "call_module" else {}
        result.match = Match((node,), {}, (node,), modules, node)
        result.root, result.graph = join(base, path), gm.graph
        result.origin = Origin(base, predicate, i, len(chosen), {result.root: tree.at(result.root)})
        results.append(result)
    return results


def why_nothing(tree: Tree, base: str, query: Query, known: Knowledge) -> str:
    """The nearest miss of a pattern, and a module that could not be searched, to be added to a message; empty where
    there is nothing to tell."""
    if isinstance(query, str) or (not isinstance(query, Pattern) and is_predicate(query)):
        return ""
    pattern = Pattern.of(query)
    unsearched: list[str] = []
    misses = [m for _, gm in _graphs(tree.at(base), known, unsearched) for m in find_matches(gm, pattern).near_misses]
    nearest = max(misses, key=lambda miss: miss.matched, default=None)
    reasons = [f"nearest miss: {nearest}"] if nearest is not None else []
    if unsearched and known(tree.model) is None:
        unsearched[0] += "; example inputs for create_schedule may help"
    return "".join(f"; {reason}" for reason in [*reasons, *unsearched[:1]])


def _graphs(
    root: nn.Module, known: Knowledge, unsearched: list[str] | None = None
) -> Iterator[tuple[str, TracedModule]]:
    """Every module below `root` that can be traced, with the calls of its submodules as single nodes. Of others,
    `unsearched` gets the reason."""
    tracer = fx.Tracer()
    for path, module in root.named_modules():
        if path and (has_no_forward(module) or tracer.is_leaf_module(module, path)):
            continue
        try:
            gm = trace_variants(module, path, (), known(module))[0]
        except Untraceable as error:
            if unsearched is not None:
                unsearched.append(str(error))
            continue
        finish(gm)
        yield path, gm


def has_no_forward(module: nn.Module) -> bool:
    """Whether a module only holds others (a ModuleList)."""
    return type(module).forward is nn.Module.forward
