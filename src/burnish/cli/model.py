"""`burnish optimize`, `burnish graph` and `burnish bench`."""

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
    ImplOption,
    LayersOption,
    ModelArgument,
    QuantizeOption,
    SeqOption,
    TextOption,
    load_model,
    parse_impls,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.capture import Program
    from burnish.graph.show import GraphReport
    from burnish.models import Loaded


class Stage(str, Enum):
    """How far a graph has come."""

    capture = "capture"
    raise_ = "raise"
    fuse = "fuse"
    pack = "pack"


VerifyOption = Annotated[bool, typer.Option(" /--no-verify", help="Leave out the check against a float64 oracle.")]


@app.command()
def optimize(
    model: ModelArgument,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    impl: ImplOption = None,
    quantize: QuantizeOption = None,
    verify: VerifyOption = True,
    cache: CacheOption = CacheMode.readwrite,
    save_report: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Optimize a model and show what was done, what it brought, and what almost matched."""
    output = Output(as_json)
    _check_writable(save_report, "--save-report")
    with output.working("starting PyTorch") as update:
        impls = parse_impls(impl)
        update(_loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device)
        update(f"optimizing {model}: capture, rewrite, measure, verify")
        import burnish

        kind, measured_on, slow = None if quantize is None else quantize.kind, None, None
        fast = burnish.optimize(
            loaded.model, loaded.args, loaded.kwargs, verify=verify, impls=impls, cache=cache.mode, quantize=kind
        )
        if kind is not None:
            from burnish.cli.quantizing import measure_perplexity, why_slow

            slow = why_slow(kind, loaded)
            update(f"measuring the perplexity of {model}")
            measured_on = measure_perplexity(fast, loaded)
        report = fast.report()
    output.data({"name": model, "origin": loaded.origin, **report.to_dict()})
    output.show(_heading(loaded), "", report)
    if measured_on is not None:
        output.show("", f"Perplexity is of {measured_on}.")
    if slow is not None:
        output.show("", f"{slow}.")
    if save_report is not None:
        report.to_json(save_report)
        output.show("", f"The report is in {save_report}.")


@app.command()
def graph(
    model: ModelArgument,
    at: Annotated[Stage, typer.Option(help="Show the graph after this step.")] = Stage.pack,
    svg: Annotated[Path | None, typer.Option(help="Draw it to this file, what is fused in colour.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Show the Python that is generated from it, too.")] = False,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's graph: as captured, with Ops in it, fused, or packed."""
    output = Output(as_json)
    _check_writable(svg, "--svg")
    with output.working("starting PyTorch") as update:
        update(_loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device)
        update(f"capturing {model}")
        from burnish.cli.stages import generated_code, highlights, program_at
        from burnish.graph.show import draw, graph_report

        program = program_at(loaded, at.value)
        table = graph_report(program.graph_module)
        source = generated_code(program, loaded.model) if code else None
        drawn = None
        if svg is not None:
            update(f"drawing {svg}")
            drawn = draw(program.graph_module, svg, highlights(program, at.value))
    output.data(
        {
            "name": model,
            "at": at.value,
            "steps": [vars(record) for record in program.history],
            "nodes": [vars(row) for row in table.nodes],
            "modules": {path: repr(module) for path, module in table.modules.items()},
            "code": source,
            "drawing": drawn and str(drawn),
        }
    )
    output.show(_heading(loaded), _counts(program, at), "", *_node_tables(table))
    if source is not None:
        output.show("")
        output.show_python(source)
    if drawn is not None:
        missing = "" if drawn.suffix == svg.suffix else " (for an SVG: pip install 'burnish[draw]')"  # type: ignore[union-attr]
        output.show("", f"The drawing is in {drawn}{missing}.")


@app.command()
def bench(
    model: ModelArgument,
    batch: BatchOption = None,
    seq: SeqOption = None,
    text: TextOption = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    impl: ImplOption = None,
    cache: CacheOption = CacheMode.readwrite,
    compile: Annotated[bool, typer.Option("--compile", help="Time torch.compile, too: it takes a while.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Timed time for each variant.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Time a model as it was and optimized, in turns."""
    output = Output(as_json)
    with output.working("starting PyTorch") as update:
        impls = parse_impls(impl)
        update(_loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device)
        import torch

        import burnish
        from burnish.cli.stages import copy_of

        # A copy: packing lays the weights out anew, and eager has to be timed on the layout that PyTorch gave them.
        variants: dict[str, Any] = {"eager": copy_of(loaded)}
        update(f"optimizing {model}")
        fast = burnish.optimize(loaded.model, loaded.args, loaded.kwargs, impls=impls, cache=cache.mode)
        variants["burnish"] = fast
        if compile:
            variants["torch.compile"] = torch.compile(variants["eager"])
        update("timing")
        with torch.inference_mode():
            result = burnish.benchmark(
                variants,
                loaded.args,
                loaded.kwargs,
                seconds=seconds,
                on_progress=lambda variant, block, blocks: update(f"timing {variant}, block {block} of {blocks}"),
            )
    kept = fast.report().served[0].kept_original
    records = result.records(model, f"burnish bench {model}")
    output.data({"kept_original": kept, "records": records, "times_as_fast": result.speedups})
    output.show(_heading(loaded), "", result)
    if kept is not None:
        output.show("", f"burnish runs the original here: {kept}.")


def _loading(model: str) -> str:
    from burnish.models import is_remote

    return f"loading {model} from the Hugging Face hub" if is_remote(model) else f"loading {model}"


def _check_writable(path: Path | None, option: str) -> None:
    """Before any work is done rather than after all of it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.absolute().parent}")


def _heading(loaded: Loaded) -> RenderableType:
    from rich.text import Text

    sizes = []
    for name, value in [*((f"input {i}", v) for i, v in enumerate(loaded.args)), *loaded.kwargs.items()]:
        shape = getattr(value, "shape", None)
        sizes.append(f"{name} {'x'.join(map(str, shape))}" if shape is not None else f"{name}={value}")
    return Text.assemble((loaded.name, "bold"), f": {loaded.origin}; {', '.join(sizes)}")


def _counts(program: Program, at: Stage) -> str:
    from burnish.cli.stages import op_nodes

    counts = [f"{len(nodes)} {name}" for name, nodes in op_nodes(program.graph_module).items()]
    return f"After {at.value}: {len(program.graph_module.graph.nodes)} nodes; Ops: {', '.join(counts) or 'none'}."


def _node_tables(report: GraphReport) -> list[RenderableType]:
    """What the graph computes, in order, in columns that fit a terminal; weights are named where they are used."""
    from rich.table import Table
    from rich.text import Text

    nodes = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("node", "is", "value"):
        nodes.add_column(heading, overflow="fold", ratio={"node": 5, "is": 12, "value": 5}[heading])
    for row in report.nodes:
        if row.opcode == "get_attr":
            continue
        name = row.target.removesuffix(".default")
        args = row.args.removeprefix("(").removesuffix(")").removesuffix(",")
        what = Text(
            "input" if row.opcode == "placeholder" else f"{name}({', '.join(filter(None, [args, row.kwargs]))})"
        )
        what.stylize("bold green" if name.startswith("burnish.") else "", 0, len(name))
        nodes.add_row(row.name, what, Text(row.value))
    return [nodes, *report.tables()[1:]]
