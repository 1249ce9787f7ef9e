"""`burnish schedule`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    FactoryOption,
    LayersOption,
    SeqOption,
    TextOption,
    load_model,
)
from burnish.cli.words import heading, loading, named_inputs

if TYPE_CHECKING:
    from rich.table import Table

    from burnish.scheduling import Schedule


@app.command()
def schedule(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for `burnish optimize`.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="What Schedule.save wrote. It names code that is imported and called: trust it as you would Python.",
            show_default=False,
        ),
    ] = None,
    primitives: Annotated[bool, typer.Option("--primitives", help="List what a step can do.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the outputs with the model's, and name the step that broke it.")
    ] = False,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Apply a saved schedule to a model: show its modules, what each step did, whether it still computes the same."""
    output = Output(as_json)
    if primitives:
        if model is not None:
            raise typer.BadParameter("--primitives lists all of them: leave out MODEL and FILE")
        _list_primitives(output)
        return
    if model is None or file is None:
        raise typer.BadParameter("give MODEL and FILE, or --primitives")
    if not file.is_file():
        raise typer.BadParameter(f"FILE {file}: there is no such file")
    with output.working("starting PyTorch") as update:
        update(loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device, factory)
        update(f"applying {file}")
        from burnish.models.factory import current_folder_importable
        from burnish.scheduling import load

        inputs = named_inputs(loaded.model, loaded.args, loaded.kwargs) if loaded.kwargs else tuple(loaded.args)
        with current_folder_importable():
            scheduled = load(file, loaded.model, inputs)
        update(f"verifying {model}")
        found = scheduled.verify() if verify else None
    output.data(
        {
            "name": model,
            "file": str(file),
            "modules": str(scheduled.mod),
            "steps": [_data(step) for step in scheduled.history],
            "verified": found and vars(found),
        }
    )
    verified = ["", *found.lines] if found is not None else []
    output.show(heading(loaded), "", str(scheduled.mod), "", _steps(scheduled), *verified)


def _list_primitives(output: Output) -> None:
    with output.working("starting PyTorch"):
        from burnish.scheduling import PRIMITIVES

        found = {name: PRIMITIVES[name].summary() for name in sorted(PRIMITIVES)}
    output.data(found)
    table = _table("primitive", "what it does")
    for name, summary in found.items():
        table.add_row(name, summary)
    output.show(table)


def _data(step: Any) -> dict[str, Any]:
    return {
        "primitive": step.primitive,
        "path": step.path,
        "code": step.code(),
        "matches": step.matches,
        "seconds": step.seconds,
        "added": step.added,
        "removed": step.removed,
    }


def _steps(scheduled: Schedule) -> Table:
    adds = any(step.added for step in scheduled.history)
    table = _table("step", "primitive", "in", "matches", "ms", *(["new modules"] if adds else []))
    for number, step in enumerate(scheduled.history, 1):
        added = ", ".join(step.added[:3]) + (f" and {len(step.added) - 3} more" if len(step.added) > 3 else "")
        time = f"{step.seconds * 1e3:.0f}"
        row = [str(number), step.primitive, step.path or "the model", str(step.matches), time]
        table.add_row(*row, *([added] if adds else []))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        right = column in ("matches", "ms")
        table.add_column(column, overflow="fold", justify="right" if right else "left")
    return table
