"""`burnish bench`."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import (
    BatchOption,
    CacheMode,
    CacheOption,
    DeviceOption,
    DtypeOption,
    FactoryOption,
    ImplOption,
    LayersOption,
    SeqOption,
    TextOption,
    load_model,
    parse_impls,
    resolve_device,
)
from burnish.cli.words import check_writable, heading, loading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from burnish.cli.benching import Swept, Timed

_PEERS = "Against what"
_BUSY = 0.5  # of the CPUs at work before this command


class CompileMode(str, Enum):
    """The modes of torch.compile."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune"
    max_autotune_no_cudagraphs = "max-autotune-no-cudagraphs"


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|OP",
            help="A model as the other commands take it, or an Op's name (burnish ops lists them).",
            show_default=False,
        ),
    ],
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="1,16,64,...", help="Time it at these sizes: tokens, or what an Op has.", rich_help_panel="Inputs"
        ),
    ] = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    factory: FactoryOption = None,
    impl: ImplOption = None,
    cache: CacheOption = CacheMode.readwrite,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile: it takes a while.", rich_help_panel=_PEERS)
    ] = False,
    compile_mode: Annotated[
        list[CompileMode] | None,
        typer.Option(help="torch.compile in this mode; repeatable.", rich_help_panel=_PEERS, show_default=False),
    ] = None,
    sdpa: Annotated[
        bool, typer.Option("--sdpa", help="PyTorch's attention by each backend.", rich_help_panel=_PEERS)
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="ONNX Runtime: the export takes a while.", rich_help_panel=_PEERS)
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time against size to this file: .svg, .png or .pdf.", show_default=False)
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Timed time for each variant (2; 0.5 at each of several sizes).", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model or an Op as it was, optimized, and by what else is here, in turns."""
    output = Output(as_json)
    busy = _busy()
    check_writable(plot, "--plot")
    asked_sizes = _parse_sizes(sizes)
    # A plot is of what is had without and with effort, so with a compiler.
    modes = [mode.value for mode in compile_mode or []] or (["default"] if compile or plot else [])
    with output.working("starting PyTorch") as update:
        if plot is not None:
            from burnish.plot import check_plot

            check_plot(plot)
        impls = parse_impls(impl)
        import burnish.ops  # noqa: F401  (registers the Ops)
        from burnish.cli.benching import Swept, sweep_model, sweep_op, time_model
        from burnish.op import OPS

        measured: Swept | Timed
        if model in OPS:
            given = {"--batch": batch, "--seq": seq, "--text": text, "--layers": layers, "--factory": factory}
            _refuse(model, {**given, "--sdpa": sdpa or None, "--onnx": onnx or None})
            target, torch_dtype = resolve_device(device), dtype.torch if dtype else None
            measured = sweep_op(model, asked_sizes, target, torch_dtype, impls, cache.mode, modes, seconds, update)
        else:
            update(loading(model))
            loaded = load_model(model, batch, seq, text, dtype, layers, device, factory)
            peers = {"compile_modes": modes, "sdpa": sdpa, "onnx": onnx}
            if asked_sizes or plot is not None:
                measured = sweep_model(loaded, asked_sizes, impls, cache.mode, peers, seconds, update)
            else:
                measured = time_model(loaded, impls, cache.mode, peers, seconds, update)
    if isinstance(measured, Swept):
        _show_sweep(output, measured, plot)
    else:
        _show_model(output, measured, hint=not (modes or sdpa or onnx))
    _show_lines(output, busy)


def _show_model(output: Output, timed: Timed, hint: bool) -> None:
    name, result = timed.loaded.name, timed.result
    output.data(
        {
            "records": result.records(name, f"burnish bench {name}"),
            "times_as_fast": result.speedups,
            "not_timed": timed.missing,
            "kept_original": timed.kept,
        }
    )
    output.show(heading(timed.loaded), "", result)
    _show_lines(output, _notes(timed.missing, [timed.kept] if timed.kept is not None else []))
    if hint:
        _show_lines(output, ["Further peers: --compile, --sdpa, --onnx."])


def _show_sweep(output: Output, swept: Swept, plot: Path | None) -> None:
    sweep = swept.sweep
    if plot is not None:
        from burnish.plot import plot_sweep

        plot_sweep(sweep, plot)
    output.data(
        {
            "records": sweep.records(f"burnish bench {sweep.name} --sizes {','.join(map(str, sweep.results))}"),
            "times_as_fast": {size: result.speedups for size, result in sweep.results.items()},
            "impls": sweep.impls,
            "not_timed": swept.missing,
            "kept_original": swept.kept,
            "plot": plot and str(plot),
        }
    )
    output.show(f"{sweep.name}: {sweep.about}", "", sweep)
    _show_lines(output, _notes(swept.missing, swept.kept))
    if plot is not None:
        _show_lines(output, [f"The plot is in {plot}."])


def _notes(missing: Mapping[str, str], kept: list[str]) -> list[str]:
    not_timed = [f"Not timed: {name} ({reason})." for name, reason in missing.items()]
    return [*not_timed, *(f"burnish runs the original here: {reason}." for reason in dict.fromkeys(kept))]


def _show_lines(output: Output, lines: list[str]) -> None:
    if lines:
        output.show("", *lines)


def _busy() -> list[str]:
    """Lines to say where others are using the machine; none where the system does not tell."""
    if not hasattr(os, "getloadavg"):
        return []
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    busy = load > _BUSY * cpus
    return [f"The machine was busy (load {load:.1f} on {cpus} CPUs): these times are off."] if busy else []


def _parse_sizes(text: str | None) -> tuple[int, ...]:
    """ "1,16" -> (1, 16), from the smallest; () where nothing was asked."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--sizes {text}: write numbers with commas between, such as 1,16,256")
    return tuple(sorted({int(part) for part in parts}))


def _refuse(op: str, given: Mapping[str, Any]) -> None:
    """Options that mean nothing for an Op."""
    if unfit := [option for option, value in given.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(unfit)}: {op} is an Op, whose inputs are chosen by --sizes and --dtype")
