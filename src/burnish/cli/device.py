"""`burnish device`: this machine, or the data sheet of a GPU that is not here."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.app import JsonOption, Output, app

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from burnish.support import ImplSupport


@app.command()
def device(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="DEVICE", help="cpu, cuda, cuda:1; default: CUDA where there is one.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Show the data sheet of a GPU that is not here: h200, a100, rtx4090, ...", show_default=False
        ),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure bandwidth and matrix rate.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show what this machine is, what it measured beside what its vendor states, and which Impls it can run."""
    output = Output(as_json)
    if target is not None:
        if name is not None:
            raise typer.BadParameter("--target is for a GPU that is not here; leave out DEVICE")
        from burnish.targets import find_target

        sheet = find_target(target)
        output.data(sheet.to_dict())
        output.show(sheet)
        return
    with output.working("measuring") as update:
        from burnish.cli.options import resolve_device
        from burnish.hardware import device as describe
        from burnish.support import impl_support

        where = resolve_device(name, typed="DEVICE")
        info = describe(name, measure=measure, refresh=refresh)
        update("asking every Impl")
        impls = impl_support(where)
    output.data(info.to_dict() | {"impls": [asdict(impl) for impl in impls]})
    output.show(info, "", *_support_view(impls))


def _support_view(impls: list[ImplSupport]) -> list[RenderableType]:
    by_op: dict[str, list[str]] = {}
    by_reason: dict[str, Counter[str]] = {}
    for impl in impls:
        if impl.runs:
            by_op.setdefault(impl.op, []).append(impl.impl)
        else:
            by_reason.setdefault("; ".join(impl.reasons), Counter())[impl.impl] += 1
    alike: dict[str, list[str]] = {}
    for op, names in by_op.items():
        alike.setdefault(", ".join(names), []).append(op)
    running = sum(impl.runs for impl in impls)
    here = _table(f"{running} of {len(impls)} Impls run here", "Impls, preferred first", "of these Ops")
    for names_here, ops in alike.items():
        here.add_row(names_here, ", ".join(ops))
    left = f"The other {len(impls) - running} took none of their Op's samples (burnish ops NAME says more)"
    others = _table(left, "why", "Impls (of so many Ops)")
    for reason, counts in by_reason.items():
        others.add_row(reason, ", ".join(name if n == 1 else f"{name}({n})" for name, n in counts.most_common()))
    return [here, others] if by_reason else [here]


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
