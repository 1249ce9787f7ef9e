"""`replace`: another module or function in the place of a module, or of matches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx, nn

from burnish.graph import Match
from burnish.graph.matcher import Matches
from burnish.graph.record import Replacement
from burnish.graph.rewriter import replace_matches
from burnish.scheduling.clone import structural_clone
from burnish.scheduling.find import FoundModule
from burnish.scheduling.locate import Site
from burnish.scheduling.primitives.matched import results_of, sites_of
from burnish.scheduling.primitives.primitive import Primitive, register
from burnish.scheduling.rewriting import (
    arguments_for,
    check_name,
    drop_uncalled,
    free_name,
    inputs_of,
    insert_call,
    leaves_of,
    name_of,
    same_inputs,
    signature_for,
)
from burnish.scheduling.tracing import calls_more_than_forward, finish

if TYPE_CHECKING:
    from burnish.scheduling.schedule import Schedule
    from burnish.scheduling.tree import Tree

New = Any  # a module, a class of modules or another object with `from_modules`, or a function


class FunctionModule(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return name_of(self.function)


@dataclass(frozen=True)
class Plan:
    """Modules to be put in the place of others, and how many matches that are."""

    changes: list[tuple[nn.Module, nn.Module]]
    count: int


@register
@dataclass(frozen=True)
class Replace(Primitive):
    """Puts a module or a function in the place of the whole module, or of matches in it.

    Matches with the same inputs (q, k, v) become one call, which returns a tuple with one result for each match, in
    order. Other matches are replaced one by one. The inputs are given by the pattern's names where `new` has these,
    else in order.

    `new` is a function; or a module; or has a `from_modules`, which is called with the modules that it replaces and
    takes over their weights. A function in the place of a match becomes part of the graph, and may call the match's own
    modules (`burnish.pattern.call_module`).
    """

    verb: ClassVar[str] = "replace"
    new: New
    match: Any = None
    name: str | None = None

    def check(self, schedule: Schedule) -> Plan:
        _check_new(self.new)
        check_name(self.name, self.verb)
        if self.match is None:
            return Plan([(schedule.mod, whole(self.new, schedule.mod, schedule.label))], 1)
        results = results_of(schedule, self.match, self.verb)
        if len(results) == 1 and isinstance(results[0], FoundModule):
            path = results[0].path
            results[0].origin.check_fresh(schedule.tree)
            return Plan([(schedule.tree.at(path), whole(self.new, schedule.tree.at(path), path))], 1)
        sites = sites_of(schedule, results, self.verb)
        self._check_shared(sites)
        for site in sites:
            self._rewrite(site, schedule.tree)
        return Plan([(site.owner, site.gm) for site in sites], sum(len(site.matches) for site in sites))

    def apply(self, schedule: Schedule, plan: Plan) -> int:
        for old, new in plan.changes:
            schedule.tree.put(old, new)
        return plan.count

    def _check_shared(self, sites: list[Site]) -> None:
        """One module with weights for several calls would tie them."""
        if not isinstance(self.new, nn.Module) or not list(self.new.parameters()):
            return
        calls = sum(1 if same_inputs(site.matches) else len(site.matches) for site in sites)
        if calls > 1:
            raise ValueError(
                f"replace: {calls} calls would share the weights of one {type(self.new).__name__}; give a class with "
                "from_modules, or replace one match"
            )

    def _rewrite(self, site: Site, tree: Tree) -> None:
        matches = site.matches
        groups = [matches] if same_inputs(matches) else [[match] for match in matches]
        paths = list(leaves_of(site, matches))
        made: list[nn.Module] = []
        if _is_function(self.new):
            self._insert_function(site, groups)
        else:
            made = self._insert_modules(site, groups)
        dropped = drop_uncalled(site, paths)
        _check_untied(made, dropped, tree)
        finish(site.gm)

    def _insert_function(self, site: Site, groups: list[list[Match]]) -> None:
        patterns = {id(group[0].pattern): group[0].pattern for group in groups}
        pattern = next(iter(patterns.values()))
        if len(patterns) > 1:
            raise ValueError("replace: a function replaces the matches of one pattern at a time")
        if pattern is not None and all(len(group) == 1 for group in groups):
            replacement = Replacement.of(_by_name(self.new, groups[0][0]), pattern)
            replace_matches(site.gm, Matches(match for group in groups for match in group), replacement)
            return
        done: dict[fx.Node, fx.Node] = {}
        for group in groups:
            insert_call(site, self.new, arguments_for(self.new, group[0]), group, done)

    def _insert_modules(self, site: Site, groups: list[list[Match]]) -> list[nn.Module]:
        done: dict[fx.Node, fx.Node] = {}
        made = []
        for group in groups:
            module = new_module(self.new, list(leaves_of(site, group).values()), site.owner.training)
            arguments = arguments_for(module, group[0])
            name = free_name(site.gm, self.name, type(module).__name__)
            site.gm.add_module(name, module)
            insert_call(site, name, arguments, group, done)
            made.append(module)
        return made


def whole(new: New, old: nn.Module, label: str) -> nn.Module:
    """What takes the place of a whole module. ValueError where it does not fit."""
    if calls_more_than_forward(old):
        raise ValueError(f"replace: {label} has hooks or is checkpointed, which would be lost")
    made = new_module(FunctionModule(new) if _is_function(new) else new, [old], old.training)
    _check_signature(new if _is_function(new) else made, old, label)
    return made


def new_module(new: New, olds: Sequence[nn.Module], training: bool) -> nn.Module:
    """The module that `new` stands for, with the weights of those that it replaces where it takes them over."""
    if isinstance(new, nn.Module):
        made = structural_clone(new)
    elif not olds:
        raise ValueError(f"replace: the match calls no modules that {name_of(new)}.from_modules could take over")
    else:
        made = new.from_modules(*olds)
        if not isinstance(made, nn.Module):
            raise ValueError(f"replace: {name_of(new)}.from_modules returned a {type(made).__name__}, not a module")
    kept = {id(module) for old in olds for module in old.modules()}
    for module in made.modules():
        if id(module) not in kept:
            module.training = training
    return made


def _check_new(new: New) -> None:
    if isinstance(new, nn.Module) or hasattr(new, "from_modules"):
        return
    if inspect.isclass(new):
        raise ValueError(f"replace: {new.__name__} is a class without from_modules; give an instance of it")
    if not callable(new):
        raise TypeError(f"replace: new must be a module or a function, got {type(new).__name__}")


def _is_function(new: New) -> bool:
    return not isinstance(new, nn.Module) and not hasattr(new, "from_modules")


def _by_name(function: Callable[..., Any], match: Match) -> Callable[..., Any]:
    """`function` with parameters that are called like the pattern's."""
    args, kwargs = arguments_for(function, match)
    if kwargs or not args:
        return function
    names = list(inputs_of(match)[1])

    def renamed(**given: Any) -> Any:
        return function(*(given[name] for name in names))

    renamed.__name__ = name_of(function)
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    renamed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return renamed


def _check_signature(new: Callable[..., Any], old: nn.Module, label: str) -> None:
    """ValueError where no call that `old` takes fits `new`."""
    wanted, given = signature_for(new), signature_for(old)
    if wanted is None or given is None:
        return
    positional = [p for p in given.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = sum(p.default is p.empty for p in positional)
    for count in range(required, len(positional) + 1):
        try:
            wanted.bind(*positional[:count])
            return
        except TypeError:
            continue
    if any(p.kind is p.VAR_POSITIONAL for p in given.parameters.values()):
        return
    raise ValueError(f"replace: {name_of(new)}{wanted} cannot be called like {label}{given}")


def _check_untied(made: Sequence[nn.Module], dropped: Sequence[nn.Module], tree: Tree) -> None:
    """ValueError where a weight that was merged is used anywhere else: the two would be trained apart."""
    merged = {
        id(tensor)
        for new in made
        for part in new.modules()
        for references in getattr(part, "merged", {}).values()
        for reference, _ in references
        if (tensor := reference()) is not None
    }
    gone = {id(module) for module in dropped}
    for path, module in tree.model.named_modules():
        if id(module) not in gone:
            for name, tensor in module._parameters.items():
                if id(tensor) in merged:
                    where = f"{path}.{name}" if path else name
                    raise ValueError(f"replace: {where} is used elsewhere too, so that it cannot be merged")
