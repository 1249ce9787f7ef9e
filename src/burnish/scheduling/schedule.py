"""`Schedule`: a model that is optimized step by step, where only what is touched changes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from burnish.scheduling.calls import Calls, ExampleInputs
from burnish.scheduling.clone import structural_clone
from burnish.scheduling.find import Query, find
from burnish.scheduling.methods import Methods
from burnish.scheduling.primitives import Primitive
from burnish.scheduling.primitives.annotate import ATTRIBUTE
from burnish.scheduling.snapshot import Snapshot
from burnish.scheduling.state_dict import keep_names, named_tensors
from burnish.scheduling.step import History, Step, arguments_of
from burnish.scheduling.tracer import Known
from burnish.scheduling.tree import Tree, join


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
    """

    original: nn.Module
    tree: Tree
    example_inputs: ExampleInputs | None
    names: dict[str, Tensor]
    history: History = field(default_factory=History)
    _calls: Calls | None = None

    def known_call(self, module: nn.Module) -> Known | None:
        """What the example inputs tell of the calls of a module; None without them, or where it is not called."""
        if self.example_inputs is None:
            return None
        if self._calls is None:
            self._calls = Calls(self.tree.model, self.example_inputs)
        return self._calls.known(module)

    def run(self, primitive: Primitive, path: str, members: Sequence[Schedule]) -> Step:
        """Applies a primitive to the members as one step, or raises and leaves all as it was."""
        started = time.perf_counter()
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
        return step


class Schedule(Methods):
    """A part of a model, and the steps applied to it.

    `sch["layers.0.mlp"]` is the Schedule of that submodule, with the same history; `"layers.0" in sch` asks whether
    there is one, and iteration gives the names of the direct submodules.
    """

    def __init__(self, work: Work, path: str) -> None:
        self._work = work
        self.path = path

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

    # --- steps ------------------------------------------------------------------------------------------------------

    def apply(self, primitive: Primitive) -> Step:
        return self._work.run(primitive, self.path, [self])

    @property
    def history(self) -> History:
        """The steps so far, of the whole model. Print it."""
        return self._work.history

    def code(self) -> str:
        """A Python program that applies the same steps to `model`; `...` stands for what cannot be written."""
        return self.history.code()

    def undo(self, n: int = 1) -> list[Step]:
        """Takes back the last `n` steps, of the whole model. Returns them, the first one first.

        Weights that were trained since keep their values, except merged ones: these are again the parameters that they
        were made of.
        """
        history = self._work.history
        if not isinstance(n, int) or not 0 <= n <= len(history):
            raise ValueError(f"undo: n must be between 0 and {len(history)}, the number of steps, got {n!r}")
        undone = history[len(history) - n :]
        if undone:
            assert undone[0].before is not None
            undone[0].before.restore()
            del history[len(history) - n :]
            self._work._calls = None
        return undone

    def build(self) -> nn.Module:
        """The module with the steps applied, independent of later steps.

        It shares its weights with the model, merged ones excepted. `state_dict()` has the model's names, and
        `load_state_dict` takes the model's checkpoints; merged weights are there as views of their parts.
        """
        built = structural_clone(self.mod)
        prefix = f"{self.path}." if self.path else ""
        names = {n[len(prefix) :]: tensor for n, tensor in self._work.names.items() if n.startswith(prefix)}
        keep_names(built, names)
        return built


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
