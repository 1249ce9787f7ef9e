"""`python -m benchmarks GROUP`: measure a group's cases and write them to results/<device>/<group>.json."""

from __future__ import annotations

import importlib
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, cast

import typer

from benchmarks.runner import RESULTS, Group, run_cases

GROUPS = {
    "startup": "benchmarks.startup",
    "ops": "benchmarks.ops",
    "cpu-models": "benchmarks.cpu_models",
    "blocks": "benchmarks.blocks",
    "encoder": "benchmarks.encoder",
    "prefill": "benchmarks.prefill",
    "decode": "benchmarks.decode",
    "generate": "benchmarks.generation",
    "serving": "benchmarks.serving",
    "parallel": "benchmarks.parallel",
    "train": "benchmarks.train",
    "ragged": "benchmarks.ragged",
}


def main(
    group: Annotated[str, typer.Argument(help=f"One of: {', '.join(GROUPS)}.")],
    case: Annotated[str, typer.Option(help="Only cases whose name matches, such as 'minilm*'.")] = "*",
    out: Annotated[Path, typer.Option(help="The folder that holds one folder per device.")] = RESULTS,
    seconds: Annotated[float, typer.Option(help="Timed seconds per variant and case.")] = 2.0,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave variants out whose name matches, such as 'compile-max*'.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and measure nothing.")] = False,
) -> None:
    """Measure a group of benchmarks on this machine. Keep it quiet: other work on the cores moves the numbers."""
    if group not in GROUPS:
        fail(f"there is no group {group!r}; there are: {', '.join(GROUPS)}")
    module = cast(Group, importlib.import_module(GROUPS[group]))
    cases = [found for found in module.cases() if fnmatchcase(found.name, case)]
    if not cases:
        fail(f"no case of {group} matches {case!r}; --list names them")
    if list_cases:
        for found in cases:
            print(found.name)
        return
    if not run_cases(group, cases, out, seconds, tuple(without or ())):
        raise typer.Exit(1)


def fail(message: str) -> None:
    print(f"benchmarks: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
