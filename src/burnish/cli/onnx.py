"""`burnish onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    FactoryOption,
    LayersOption,
    ModelArgument,
    SeqOption,
    TextOption,
    load_model,
)
from burnish.cli.words import as_typed, check_writable, heading, loading


@app.command()
def onnx(
    model: ModelArgument,
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it (model.onnx).")
    ] = None,
    submodule: Annotated[
        str | None, typer.Option(metavar="PATH", help="This submodule alone, such as model.layers.0.mlp.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="A language model's step, keys and values of the past in and out.")
    ] = False,
    opset: Annotated[
        int, typer.Option(min=18, max=23, help="From 23 on with ONNX's own attention, RMS norm and rotation.")
    ] = 20,
    plain: Annotated[bool, typer.Option("--plain", help="Standard operators only, no functions.")] = False,
    check: Annotated[bool, typer.Option(" /--no-check", help="Leave out the check in ONNX Runtime.")] = True,
    external_data: Annotated[
        bool | None,
        typer.Option("--external-data/--one-file", help="Weights in a file of their own (where one is too small)."),
    ] = None,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    factory: FactoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model, a submodule or a decode step as an ONNX file, and check it in ONNX Runtime."""
    output = Output(as_json)
    path = to or Path("model.onnx")
    check_writable(path, "--output")
    with output.working("starting PyTorch") as update, as_typed(path="--submodule", decode="--decode"):
        update(loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device, factory)
        kwargs = {name: value for name, value in loaded.kwargs.items() if not (decode and name == "use_cache")}
        update(f"writing {model} to {path}{': capture, rewrite, export, compare' if check else ''}")
        import burnish

        file = burnish.to_onnx(
            loaded.model,
            loaded.args,
            path,
            kwargs,
            submodule=submodule,
            decode=decode,
            fused=not plain,
            opset=opset,
            check=check,
            external_data=external_data,
        )
    output.data({"name": model, "origin": loaded.origin, "submodule": submodule, "decode": decode, **file.to_dict()})
    output.show(heading(loaded), "", file)
