"""`burnish isolate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelArgument,
    SeqOption,
    TextOption,
    load_model,
)
from burnish.cli.words import as_typed, loading, named_inputs, sizes


@app.command()
def isolate(
    model: ModelArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Of the submodule, such as model.layers.0.mlp.")],
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to put it (a folder named like PATH).")
    ] = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut a submodule out of a model, with the inputs that it gets there, to explain and time it alone."""
    output = Output(as_json)
    folder = to or Path(path)
    with output.working("starting PyTorch") as update, as_typed(path="PATH", folder="--to"):
        import burnish
        from burnish._text import human_bytes
        from burnish.isolated.folder import check_free

        check_free(folder)
        update(loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device)
        update(f"running {model} as far as {path}")
        isolated = burnish.isolate(loaded.model, loaded.args, path, loaded.kwargs)
        update(f"writing {folder}")
        builds_itself = isolated.save(folder)
    module = isolated.module
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = sum(parameter.nbytes for parameter in module.parameters())
    inputs = sizes(named_inputs(module, isolated.args, isolated.kwargs))
    again = shlex.quote(str(folder)) + ("" if builds_itself else f" --factory {shlex.quote(model)}")
    output.data(
        {
            "name": model,
            "path": path,
            "class": type(module).__name__,
            "folder": str(folder),
            "parameters": parameters,
            "inputs": inputs,
            "needs_factory": not builds_itself,
        }
    )
    output.show(
        f"Submodule {path} of {model}: {type(module).__name__}, {parameters:,} parameters ({human_bytes(size)}).",
        f"Its inputs there: {', '.join(inputs) or 'none'}.",
        f"Both are in the folder {folder}. Go on with:",
        "",
        *(
            f"    burnish {command}"
            for command in (f"explain {again}", f"optimize {again}", f"bench {again} --plot plot.svg")
        ),
    )
