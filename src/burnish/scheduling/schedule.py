"""`Schedule`: a model that is optimized step by step, where only what is touched changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from burnish.capture import Program
from burnish.quantized_weights import Quantization
from burnish.scheduling.as_called import check_as_called
from burnish.scheduling.calls import Calls, ExampleInputs
from burnish.scheduling.clone import structural_clone
from burnish.scheduling.find import Query, find
from burnish.scheduling.methods import Methods
from burnish.scheduling.primitives import Primitive
from burnish.scheduling.primitives.annotate import ATTRIBUTE
from burnish.scheduling.primitives.optimize import Optimize
from burnish.scheduling.snapshot import Snapshot
from burnish.scheduling.state_dict import keep_names, named_tensors
from burnish.scheduling.step import History, Step, arguments_of
from burnish.scheduling.tracer import Known
from burnish.scheduling.tracing import TracedModule
from burnish.scheduling.tree import Tree, join
from burnish.scheduling.whole_model import WholeModel
from burnish.served import Served
from burnish.serving import Serving
from burnish.settings import Settings
from burnish.verify import Verification


def create_schedule(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None) -> Schedule:
    """A Schedule of `model`, with no steps yet. `model` itself is never changed; the weights are shared, not copied.

    Args:
        example_inputs: of one call of the model, a tuple of positional arguments or a dict of keyword arguments. They
            say how the model calls its submodules: with which optional arguments, and which of these are constants.
            Modules whose forward depends on that can then be traced.

    Raises TypeError for what is no module or no inputs, ValueError for a model that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = ExampleInputs.of(example_inputs)
    return Schedule(Work(model, Tree(structural_clone(model)), inputs, named_tensors(model)), "")


@dataclass
class Work:
    """What the Schedules of all parts of a model have in common.

    Attributes:
        original: the user's model, as it was given.
        names: the names of its weights.
        after_step: called after each step that was applied.
    """

    original: nn.Module
    tree: Tree
    example_inputs: ExampleInputs | None
    names: dict[str, Tensor]
    history: History = field(default_factory=History)
    serving: Serving | None = None
    after_step: Callable[[Step], None] | None = None
    _is_shared: bool = False
    _calls: Calls | None = None

    @property
    def settings(self) -> Settings | None:
        """Of the step "optimize"; None where there is none."""
        found = next((step for step in self.history if step.name == Optimize.verb), None)
        return None if found is None else Settings(**found.arguments)

    def own_the_tree(self) -> None:
        """From now on the tree is a copy, where it was the user's model: somebody else's serving runs that."""
        if self._is_shared:
            self.tree, self._is_shared = Tree(structural_clone(self.original)), False

    def known_call(self, module: nn.Module) -> Known | None:
        """What the example inputs tell of the calls of a module; None without them, or where it is not called."""
        if self.example_inputs is None:
            return None
        if self._calls is None:
            self._calls = Calls(self.tree.model, self.example_inputs)
        return self._calls.known(module)

    def check_graphs(self, graphs: Mapping[nn.Module, TracedModule]) -> None:
        """Untraceable where the graph of a module of the tree is wrong on the example inputs."""
        called = {module: graph for module, graph in graphs.items() if self.known_call(module) is not None}
        if called and self.example_inputs is not None:
            check_as_called(self.tree.model, self.example_inputs, called)

    def run(self, primitive: Primitive, path: str, members: Sequence[Schedule]) -> Step:
        """Applies a primitive to the members as one step, or raises and leaves all as it was."""
        started = time.perf_counter()
        self.own_the_tree()
        before, names = Snapshot.take(self.tree), set(self.tree.names())
        step = Step(primitive.verb, path, arguments_of(primitive), before=before)
        try:
            plans = [primitive.check(member) for member in members]
            for member, plan in zip(members, plans, strict=True):
                step.matches += primitive.apply(member, plan)
        except BaseException:
            before.restore()
            raise
        after = list(self.tree.names())
        step.added = tuple(name for name in after if name not in names)
        step.removed = tuple(sorted(names.difference(after)))
        step.seconds = time.perf_counter() - started
        self.history.append(step)
        self._calls = None
        if self.after_step is not None:
            self.after_step(step)
        return step


class Schedule(Methods, WholeModel):
    """A part of a model, and the steps applied to it.

    `sch["layers.0.mlp"]` is the Schedule of that submodule, with the same history; `"layers.0" in sch` asks whether
    there is one, and iteration gives the names of the direct submodules.
    """

    def __init__(self, work: Work, path: str) -> None:
        self._work = work
        self.path = path

    @classmethod
    def of(cls, serving: Serving) -> Schedule:
        """That of a model which was optimized: with one step so far."""
        model, settings = serving.model, serving.settings
        work = Work(model, Tree(model), None, named_tensors(model), serving=serving, _is_shared=True)
        given = {f.name: getattr(settings, f.name) for f in fields(settings)}
        work.history.append(Step(Optimize.verb, "", arguments_of(Optimize(**given)), 1))
        return cls(work, "")

    # --- the module -------------------------------------------------------------------------------------------------

    @property
    def mod(self) -> nn.Module:
        """The module as scheduled so far. KeyError where a step has removed it."""
        return self._work.tree.at(self.path)

    @property
    def tree(self) -> Tree:
        """The whole model's modules."""
        return self._work.tree

    @property
    def original(self) -> nn.Module:
        """The whole model as it was given."""
        return self._work.original

    @property
    def example_inputs(self) -> ExampleInputs | None:
        """Of one call of the whole model."""
        return self._work.example_inputs

    @property
    def annotations(self) -> dict[str, Any]:
        """What `annotate` wrote on the module."""
        return dict(vars(self.mod).get(ATTRIBUTE, {}))

    @property
    def label(self) -> str:
        """The module's path, or the model's class: for messages."""
        return self.path or type(self.mod).__name__

    def __getitem__(self, path: str) -> Schedule:
        if not isinstance(path, str):
            raise TypeError(f"a submodule is asked for by its path, such as 'layers.0', got {path!r}")
        whole = join(self.path, path)
        self._work.tree.at(whole)
        return Schedule(self._work, whole)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._work.tree.has(join(self.path, path))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.mod.named_children())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        steps = len(self.history)
        where = f" at {self.path!r}" if self.path else ""
        return f"Schedule of {type(self.mod).__name__}{where}, {steps} step{'' if steps == 1 else 's'}"

    # --- finding ----------------------------------------------------------------------------------------------------

    def find(self, query: Query) -> list[Any]:
        """Where something is in the module.

        Args:
            query: a regular expression for names of submodules, which must match the whole name or path; a pattern (a
                function or a module), see `burnish.pattern`; or a function that says yes or no to a node, whose
                parameter is called `node` or annotated as `fx.Node`.

        Returns:
            For a pattern, a list of occurrences, each a list of (parent path, node). Else a list of (parent path, name)
            or (parent path, node). Empty where there is nothing. The paths are relative to this Schedule's module.
        """
        return find(self.tree, self.path, query, self.known_call)

    def find_all(self, glob: str) -> Group:
        """The submodules whose path matches, as a group on which each primitive runs for every member, as one step.

        Args:
            glob: a path in which `*` stands for one name or a part of it: "layers.*.mlp".

        Raises ValueError where there are none.
        """
        return Group.of(self, glob)

    def known_call(self, module: nn.Module) -> Known | None:
        """What the example inputs tell of the calls of a module; None without them, or where it is not called."""
        return self._work.known_call(module)

    def check_graphs(self, graphs: Mapping[nn.Module, TracedModule]) -> None:
        """Untraceable where the graph of a module of the tree is wrong on the example inputs."""
        self._work.check_graphs(graphs)

    # --- steps ------------------------------------------------------------------------------------------------------

    def apply(self, primitive: Primitive) -> Step:
        return self._work.run(primitive, self.path, [self])

    @property
    def history(self) -> History:
        """The steps so far, of the whole model; in the place of `optimize` what its default steps did. Print it."""
        steps, served = self._work.history, self._work.serving
        if served is None or not served.history:
            return steps
        return History(part for s in steps for part in (served.history if s.name == Optimize.verb else [s]))

    def code(self) -> str:
        """A Python program that applies the same steps to `model`; `...` stands for what cannot be written."""
        return self._work.history.code()

    def undo(self, n: int | str = 1) -> list[Step]:
        """Takes back the last `n` steps, of the whole model. Returns them, the first one first.

        Weights that were trained since keep their values, except merged ones: these are again the parameters that they
        were made of.

        Args:
            n: how many; or, of an optimized model, the name of a default step ("raise", "fuse", "pack") or of a rewrite
                in the history ("linear_add_norm"; "attention" for all its spellings): the model that was optimized, and
                those that are built later, do without it.

        Raises ValueError for what is not there.
        """
        history = self._work.history
        if isinstance(n, str):
            self._leave_out(n)
            return []
        if not isinstance(n, int) or not 0 <= n <= len(history):
            raise ValueError(f"undo: n must be between 0 and {len(history)}, the number of steps, got {n!r}")
        undone = history[len(history) - n :]
        if undone:
            before = next((step.before for step in undone if step.before is not None), None)
            if before is not None:  # the step of a model that was optimized changed no module
                training = self.tree.model.training
                before.restore()
                if self.tree.model.training != training:  # train() and eval() since are no steps
                    self.tree.model.train(training)
            del history[len(history) - n :]
            self._work._calls = None
            self._work.serving = None if self.settings is None else self._work.serving
        return undone

    def build(self) -> nn.Module:
        """The module with the steps applied, independent of later steps.

        It shares its weights with the model, merged ones excepted. `state_dict()` has the model's names, and
        `load_state_dict` takes the model's checkpoints; merged weights are there as views of their parts.
        """
        settings = None if self.path else self.settings
        built = structural_clone(self.mod)
        prefix = f"{self.path}." if self.path else ""
        names = {n[len(prefix) :]: tensor for n, tensor in self._work.names.items() if n.startswith(prefix)}
        keep_names(built, names)
        if settings is None:
            return built
        self._work.serving = Serving(built, settings, self)
        return self._work.serving.build()

    def _leave_out(self, name: str) -> None:
        step = next((step for step in self._work.history if step.name == Optimize.verb), None)
        if step is None:
            raise ValueError(f"undo: {name!r} would be one of the default steps, and optimize() is not among the steps")
        serving = self._work.serving or Serving(self.mod, Settings(**step.arguments), self)
        serving.leave_out(name)
        step.arguments["without"] = serving.settings.without

    # --- of the step "optimize" ---------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings | None:
        """The arguments of the step "optimize"; None where there is none."""
        return self._work.settings

    @property
    def program(self) -> Program:
        """The first captured Program. ValueError where nothing is optimized, or called yet."""
        return self._served().program

    @property
    def programs(self) -> list[Program]:
        """All Programs, in the order in which they were captured."""
        return self._served().programs

    @property
    def served(self) -> list[Served]:
        """How each signature is served."""
        return self._served().served

    @property
    def verifications(self) -> list[Verification]:
        """What was verified, for each Program that was."""
        return self._served().verifications

    @property
    def quantizations(self) -> list[Quantization]:
        """What was quantized, for each Program."""
        return self._served().quantizations

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Before and after quantizing, where `burnish.perplexity_change` measured it."""
        return self._served().perplexity

    def _served(self) -> Serving:
        if self._work.serving is None:
            raise ValueError("nothing is optimized: call sch.optimize(), and the model that sch.build() gives")
        return self._work.serving


class Group(Methods):
    """Several submodules, to which every primitive is applied as one step. Iterate over it for their Schedules."""

    def __init__(self, work: Work, glob: str, members: list[Schedule]) -> None:
        self._work = work
        self._glob = glob
        self._members = members

    @classmethod
    def of(cls, schedule: Schedule, glob: str) -> Group:
        if not isinstance(glob, str) or not glob:
            raise ValueError(f"find_all: give a path with *, such as 'layers.*.mlp', got {glob!r}")
        wanted = glob.split(".")
        paths = [path for path, _ in schedule.mod.named_modules() if path]
        found = [
            path
            for path in paths
            if len(parts := path.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
        ]
        if not found:
            raise ValueError(
                f"find_all: {schedule.label} has no submodules {glob!r}; its own are {', '.join(schedule)}"
            )
        return cls(schedule._work, join(schedule.path, glob), [schedule[path] for path in found])

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Schedule:
        return self._members[index]

    def __repr__(self) -> str:
        return f"{len(self)} Schedules at {self._glob!r}"

    def apply(self, primitive: Primitive) -> Step:
        return self._work.run(primitive, self._glob, self._members)


__all__ = ["Group", "Schedule", "create_schedule"]
