"""What all groups share: a case, checking variants before they are timed, running cases, saving what they measured."""

from __future__ import annotations

import os
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress
from torch.utils._pytree import tree_leaves

from burnish import numerics
from burnish.bench import Benchmark, benchmark, save_records
from burnish.hardware import device

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """One run of the benchmarks: where to print, how long to measure, what to type to repeat a case, and patterns of
    the variants to leave out."""

    console: Console
    group: str
    seconds: float
    without: tuple[str, ...] = ()

    def wants(self, variant: str) -> bool:
        return not any(fnmatchcase(variant, pattern) for pattern in self.without)

    def command(self, case: str) -> str:
        without = "".join(f" --without {shlex.quote(pattern)}" for pattern in self.without)
        return f"python -m benchmarks {self.group} --case {shlex.quote(case)}{without}"

    def time(
        self,
        variants: Mapping[str, Callable[..., object]],
        args: Sequence[Any] = (),
        cold_l2: bool = False,
        rounds: int = 5,
    ) -> Benchmark:
        """`benchmark` with a progress bar."""
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("timing", total=None)

            def show(variant: str, block: int, blocks: int) -> None:
                progress.update(task, description=f"timing {variant}", completed=block - 1, total=blocks)

            return benchmark(variants, args, seconds=self.seconds, rounds=rounds, cold_l2=cold_l2, on_progress=show)


@dataclass(frozen=True)
class Case:
    """One thing to measure. `run` returns its records, and raises CheckError where Burnish computed wrong numbers."""

    name: str
    run: Callable[[Session], list[Record]]


class Group(Protocol):
    """A module with cases."""

    def cases(self) -> Iterator[Case]: ...


class CheckError(AssertionError):
    """Burnish's own result failed the numerics rule: there is nothing worth timing."""


def verdicts(outputs: Mapping[str, object], eager: object, oracle: object) -> dict[str, str | None]:
    """For each variant's output why it fails the numerics rule, or None where it holds. Output classes may differ."""
    flat_eager, flat_oracle = tree_leaves(eager), tree_leaves(oracle)
    return {
        name: numerics.check(tree_leaves(output), flat_eager, flat_oracle).reason for name, output in outputs.items()
    }


def run_cases(group: str, cases: Sequence[Case], out: Path, seconds: float, without: tuple[str, ...] = ()) -> bool:
    """Run the cases one after another, each saved when it is done. False where one failed; the others still run."""
    console = Console()
    session = Session(console, group, seconds, without)
    path = out / device(measure=False).slug / f"{group}.json"
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]the machine is busy (load {load:.1f}): the numbers will be off[/yellow]")
    failed = []
    for number, case in enumerate(cases, start=1):
        console.print(f"[bold]{case.name}[/bold]  ({number} of {len(cases)})")
        try:
            records = case.run(session)
        except Exception as error:
            # One broken case must not cost the hours of the others: it is shown, counted, and fails the run at its end.
            failed.append(case.name)
            if not isinstance(error, CheckError):
                traceback.print_exc()
            console.print(f"[red]{case.name}: {type(error).__name__}: {error}[/red]")
            continue
        save_records(path, records)
    console.print(f"{len(cases) - len(failed)} of {len(cases)} cases saved in {path}")
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/red]")
    return not failed
