"""`burnish graph`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
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
    ModelArgument,
    SeqOption,
    TextOption,
    load_model,
)
from burnish.cli.words import check_writable, heading, loading

if TYPE_CHECKING:
    from rich.console import RenderableType

    from burnish.capture import Program
    from burnish.graph.show import GraphReport


class Stage(str, Enum):
    """How far a graph has come."""

    capture = "capture"
    raise_ = "raise"
    fuse = "fuse"
    pack = "pack"
    lower_ = "lower"


@app.command()
def graph(
    model: ModelArgument,
    at: Annotated[Stage, typer.Option(help="Show the graph after this step.")] = Stage.pack,
    svg: Annotated[Path | None, typer.Option(help="Draw it to this file, what is fused in colour.")] = None,
    code: Annotated[bool, typer.Option("--code", help="Show the Python that is generated from it, too.")] = False,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="REWRITE", help="Show where this rewrite matched, where it almost did, and what differed there."
        ),
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
    """Show a model's graph: as captured, with Ops in it, fused, packed, or with an Impl for each Op."""
    output = Output(as_json)
    check_writable(svg, "--svg")
    asked = (model, batch, seq, text, dtype, layers, device, factory)
    if why is not None:
        if svg is not None or code:
            raise typer.BadParameter("--why shows no graph: leave out --svg and --code")
        _show_why(output, why, asked)
        return
    with output.working("starting PyTorch") as update:
        update(loading(model))
        loaded = load_model(*asked)
        update(f"optimizing {model}" if at is Stage.lower_ else f"capturing {model}")
        from burnish.cli.stages import generated_code, highlights, program_at
        from burnish.graph.show import draw, graph_report
        from burnish.rewrites.rewrite import names_of_sizes

        program = program_at(loaded, at.value)
        symbols = names_of_sizes(program.graph_module.graph)
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
            "steps": [asdict(record) for record in program.history],
            "sizes": symbols,
            "nodes": [vars(row) for row in table.nodes],
            "modules": {path: repr(module) for path, module in table.modules.items()},
            "code": source,
            "drawing": drawn and str(drawn),
        }
    )
    legend = [f"Sizes: {', '.join(f'{symbol} is {name}' for symbol, name in symbols.items())}."] if symbols else []
    output.show(heading(loaded), _counts(program, at), *legend, "", *_node_tables(table))
    if source is not None:
        output.show("")
        output.show_python(source)
    if drawn is not None:
        missing = "" if drawn.suffix == svg.suffix else " (for an SVG: pip install 'burnish[draw]')"  # type: ignore[union-attr]
        output.show("", f"The drawing is in {drawn}{missing}.")


def _show_why(output: Output, why: str, asked: tuple[Any, ...]) -> None:
    with output.working("starting PyTorch") as update:
        from burnish.capture import capture
        from burnish.cli.stages import op_nodes
        from burnish.cli.why import attempts, described, find_rewrites

        rewrites = find_rewrites(why)
        update(loading(asked[0]))
        loaded = load_model(*asked)
        update(f"capturing {asked[0]}")
        program = capture(loaded.model, loaded.args, loaded.kwargs)
        captured = len(op_nodes(program.graph_module).get(why, []))  # as Hugging Face's attention is
        found = attempts(program, rewrites)
    output.data({"name": loaded.name, "captured_as_op": captured, "rewrites": [asdict(attempt) for attempt in found]})
    already = [f"Captured as the Op, with no rewrite to wait for: {captured} {why}.", ""] if captured else []
    output.show(heading(loaded), "", *already, *map(_indented, described(found)))


def _indented(line: str) -> RenderableType:
    """A line that keeps its indent where it is wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    text = line.lstrip()
    return Padding(Text(text), (0, 0, 0, len(line) - len(text)))


def _counts(program: Program, at: Stage) -> str:
    from burnish.cli.stages import op_nodes

    counts = [f"{len(nodes)} {name}" for name, nodes in op_nodes(program.graph_module).items()]
    weights = sum(node.op == "get_attr" for node in program.graph_module.graph.nodes)
    nodes = f"{len(program.graph_module.graph.nodes)} nodes, {weights} of them weights"
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in program.history[-1].notes if at is Stage.lower_)
    return f"After {at.value}: {nodes}; Ops: {', '.join(counts) or 'none'}.{notes}"


def _node_tables(report: GraphReport) -> list[RenderableType]:
    """What the graph computes, in order, in columns that fit a terminal; weights are named where they are used."""
    from rich.table import Table
    from rich.text import Text

    nodes = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title, ratio in (("node", 5), ("is", 12), ("value", 5)):
        nodes.add_column(title, overflow="fold", ratio=ratio)
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
