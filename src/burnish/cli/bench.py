"""`burnish bench`."""

from __future__ import annotations

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
    Padding,
    PaddingOption,
    SeqOption,
    TextOption,
    load_model,
    parse_impls,
    resolve_device,
)
from burnish.cli.words import check_writable, heading, loading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from burnish.bench import Benchmark
    from burnish.cli.benching import Swept, Timed

_PEERS = "Against what"


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
    padding: PaddingOption = Padding.keep,
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
        from burnish.models import ModelError
        from burnish.op import OPS

        measured: Swept | Timed
        if model in OPS:
            given = {"--batch": batch, "--seq": seq, "--text": text, "--layers": layers, "--factory": factory}
            removed = padding.value if padding is Padding.remove else None
            _refuse(model, {**given, "--sdpa": sdpa or None, "--onnx": onnx or None, "--padding": removed})
            target, torch_dtype = resolve_device(device), dtype.torch if dtype else None
            measured = sweep_op(model, asked_sizes, target, torch_dtype, impls, cache.mode, modes, seconds, update)
        else:
            update(loading(model))
            try:
                loaded = load_model(model, batch, seq, text, dtype, layers, device, factory)
            except ModelError as error:
                if not model.isidentifier():
                    raise
                raise ModelError(f"{error}; nor is it an Op (burnish ops lists them)") from error
            peers = {"compile_modes": modes, "sdpa": sdpa, "onnx": onnx}
            if asked_sizes or plot is not None:
                measured = sweep_model(loaded, asked_sizes, impls, cache.mode, peers, seconds, update, padding.value)
            else:
                measured = time_model(loaded, impls, cache.mode, peers, seconds, update, padding.value)
    if isinstance(measured, Swept):
        _show_sweep(output, measured, plot)
        results = {f" at {size:,} {measured.sweep.axis}": result for size, result in measured.sweep.results.items()}
    else:
        _show_model(output, measured, hint=not (modes or sdpa or onnx))
        results = {"": measured.result}
    _show_lines(output, _unsteady(results))


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


def _unsteady(results: Mapping[str, Benchmark]) -> list[str]:
    """A line on the variant that was disturbed most, if one was; `results` by where they were taken."""
    from burnish.bench import unsteady

    timings = [(name + where, timing) for where, result in results.items() for name, timing in result.timings.items()]
    calls, worst = max(timings, key=lambda each: each[1].median_us / each[1].p20_us)
    line = unsteady(calls, worst.median_us, worst.p20_us)
    return [] if line is None else [line]


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
