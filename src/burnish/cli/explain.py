"""`burnish explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    BatchOption,
    CacheMode,
    CacheOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FactoryOption,
    LayersOption,
    ModelArgument,
    SeqOption,
    TextOption,
    resolve_device,
)
from burnish.cli.words import check_writable, heading, loading

if TYPE_CHECKING:
    from burnish.models import Wanted

_FILES = "Files"


@app.command()
def explain(
    model: ModelArgument,
    target: Annotated[
        str | None,
        typer.Option(help="Predict for a GPU that is not here: h200, a100, rtx4090, ...", show_default=False),
    ] = None,
    optimized: Annotated[
        bool, typer.Option("--optimize", help="Optimize it, too, and show before and after side by side.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Show what ONNX Runtime makes of it, too; with --optimize beside it.")
    ] = False,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    factory: FactoryOption = None,
    cache: CacheOption = CacheMode.readwrite,
    html: Annotated[
        Path | None, typer.Option(help="A page with charts and graphs, which needs no network.", rich_help_panel=_FILES)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Tables for an issue or a pull request.", rich_help_panel=_FILES)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The costliest block's kernels, for Perfetto.", rich_help_panel=_FILES)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a model's time goes, op by op, how far that is from the device's limits, and what could be fused."""
    output = Output(as_json)
    files = {"--html": html, "--markdown": markdown, "--trace": trace}
    for option, path in files.items():
        check_writable(path, option)
    if target is not None and (device is not None or optimized or onnx):
        unfit = "--device" if device is not None else "--optimize" if optimized else "--onnx"
        raise typer.BadParameter(f"--target is for a GPU that is not here: nothing is run; leave out {unfit}")
    with output.working("starting PyTorch") as update:
        wanted = _wanted(batch, seq, text, dtype, layers, device, factory, target)
        update(loading(model))
        import burnish
        from burnish.models import load

        loaded = load(model, wanted)
        args, kwargs = loaded.args, loaded.kwargs
        report = burnish.explain(
            loaded.model, args, kwargs, target=target, on_progress=lambda doing: update(f"{model}: {doing}")
        )
        if optimized:
            update(f"{model}: optimizing: capture, rewrite, measure, verify")
            fast = burnish.optimize(loaded.model, args, kwargs, cache=cache.mode)
            update(f"{model}: measuring each op again")
            report = fast.report(args, kwargs, before=report)
        others = {}
        if onnx:
            update(f"{model}: ONNX Runtime: export, compare, measure")
            from burnish.report.onnxruntime import explain_onnx

            ours = None if report.explanation is None else report.explanation.after
            others["onnxruntime"] = explain_onnx(loaded.model, args, kwargs, ours=ours)
    data = {name: each.to_dict() for name, each in others.items()}
    output.data({"name": model, "origin": loaded.origin, **report.to_dict(), **data})
    output.show(heading(loaded), "", report)
    for each in others.values():
        output.show("", each)
    writers = ((html, report.to_html), (markdown, report.to_markdown), (trace, report.to_trace))
    written = [f"{write(path)} is written." for path, write in writers if path is not None]
    if written:
        output.show("", *written)


def _wanted(
    batch: int | None,
    seq: int | None,
    text: list[str] | None,
    dtype: Dtype | None,
    layers: int | None,
    device: str | None,
    factory: str | None,
    target: str | None,
) -> Wanted:
    """What to load. For a GPU that is not here, weights without values: they need no memory."""
    import torch

    from burnish.models import Wanted

    if target is not None:
        from burnish.targets import find_target

        find_target(target)
    where = torch.device("meta") if target is not None else resolve_device(device)
    return Wanted(batch, seq, dtype.torch if dtype else None, layers, tuple(text or ()), where, factory)
