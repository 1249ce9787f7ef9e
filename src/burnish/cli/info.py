"""`burnish demo` and `burnish ops`."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.options import CacheMode, CacheOption, DeviceOption, Dtype, resolve_device

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

    from burnish.op import Op, Sample


@app.command()
def demo(device: DeviceOption = None, cache: CacheOption = CacheMode.readwrite, as_json: JsonOption = False) -> None:
    """Show it on a real model: all-MiniLM-L6-v2 on real sentences, before and after."""
    output = Output(as_json)
    with output.working("starting PyTorch") as update:
        from burnish.cli.demo_view import render
        from burnish.demo import run

        result = run(resolve_device(device), cache=cache.mode, on_progress=update)
    output.data(result.to_dict())
    output.show(render(result))


@app.command()
def ops(
    name: Annotated[str | None, typer.Argument(help="One Op in detail.", show_default=False)] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the sample inputs.")] = Dtype.fp32,
    device: DeviceOption = None,
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="Forget what was measured and captured.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every Op, its implementations, and what runs on this machine."""
    output = Output(as_json)
    if clear_cache:
        if name is not None:
            raise typer.BadParameter("--clear-cache clears for all Ops; leave out the name")
        _clear_cache(output)
        return
    with output.working("starting PyTorch"):
        from burnish.op import OPS, find_op

        target = resolve_device(device)
        find_op(name or "linear")  # registers them all
        chosen = [find_op(name)] if name else [OPS[key] for key in sorted(OPS)]
        data = [_op_data(op, target, dtype) for op in chosen]
    output.data(data if name is None else data[0])
    if name is None:
        output.show(_overview(data, target, dtype))
    else:
        output.show(*_detail(chosen[0], data[0], dtype))


def _clear_cache(output: Output) -> None:
    from burnish.tuning_store import clear_cache

    files = clear_cache()
    output.data({"deleted": [str(file) for file in files]})
    output.show(*(f"deleted {file}" for file in files) if files else ("there was nothing to delete",))


# --- what is said of an Op --------------------------------------------------------------------------------------------


def _op_data(op: Op, target: torch.device, dtype: Dtype) -> dict[str, Any]:
    samples = list(op.samples(target, dtype.torch))
    first = samples[0]
    return {
        "name": op.name,
        "signature": op.name + re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(op.signature)),
        "summary": (inspect.getdoc(op) or "").split("\n")[0],
        "impls": [
            {
                "name": impl.name,
                "description": "the Op's definition in plain PyTorch" if impl.name == "reference" else impl.description,
                "why_not": impl.why_not(*first.args, **first.kwargs),
                "reasons": list(dict.fromkeys(r for s in samples for r in impl.why_not(*s.args, **s.kwargs))),
                "takes": [sample.label for sample in samples if not impl.why_not(*sample.args, **sample.kwargs)],
                "differentiable": impl.differentiable,
            }
            for impl in op.impls.values()
        ],
        "samples": [_sample_data(op, sample) for sample in samples],
    }


def _sample_data(op: Op, sample: Sample) -> dict[str, Any]:
    cost = op.cost(*sample.args, **sample.kwargs)
    inputs = [f"{parameter}={_short(value)}" for parameter, value in _given(op, sample)]
    runs = op.select(*sample.args, **sample.kwargs).name
    return {"label": sample.label, "inputs": inputs, "flops": cost.flops, "bytes": cost.bytes, "runs_by_default": runs}


def _given(op: Op, sample: Sample) -> list[tuple[str, Any]]:
    """The arguments that differ from their defaults, by name."""
    defaults = {name: parameter.default for name, parameter in op.signature.parameters.items()}
    bound = zip(defaults, op.bind(*sample.args, **sample.kwargs), strict=True)
    return [(name, value) for name, value in bound if value is not defaults[name]]


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return "x".join(map(str, shape)) if shape is not None else str(value)


def _overview(data: list[dict[str, Any]], target: torch.device, dtype: Dtype) -> RenderableType:
    from rich.text import Text

    title = f"What runs on {target} in {dtype.value}: Ops and, under each, its Impls"
    table = _table(title, "Op", "here", "what it is")
    for number, op in enumerate(data):
        if number:
            table.add_row()
        table.add_row(Text(op["name"], style="bold"), "", Text(op["summary"], style="bold"))
        for impl in op["impls"]:
            what, here = Text(impl["description"]), Text("yes", style="green")
            if impl["why_not"]:
                what, here = Text("; ".join(impl["why_not"]), style="yellow"), Text("no", style="yellow")
            table.add_row(f"  {impl['name']}", here, what)
    return table


def _detail(op: Op, data: dict[str, Any], dtype: Dtype) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    from burnish._text import human_bytes

    preference = "Impls, in order of preference where nothing was measured"
    impls = _table(preference, "Impl", "samples", "gradients", "why not")
    count = len(data["samples"])
    for impl in data["impls"]:
        gradients = "its own" if impl["differentiable"] else "the reference's"
        impls.add_row(impl["name"], f"{len(impl['takes'])} of {count}", gradients, Text("\n".join(impl["reasons"])))
    costs = _table(
        f"What one call needs at the least ({dtype.value})", "sample", "inputs", ">MFLOP", ">bytes", ">FLOP per byte"
    )
    for sample in data["samples"]:
        intensity = sample["flops"] / max(sample["bytes"], 1)
        numbers = (f"{sample['flops'] / 1e6:,.3g}", human_bytes(sample["bytes"]), f"{intensity:.3g}")
        costs.add_row(Text(sample["label"]), Text(", ".join(sample["inputs"])), *numbers)
    # Paragraphs and "Shapes: ..." lines stay; lines broken for the source's width are joined.
    document = Text(re.sub(r"(?<!\n)\n(?!\n|[A-Z][\w ]*: )", " ", inspect.getdoc(op) or ""))
    return [Text(data["signature"], style="bold"), "", Padding(document, (0, 0, 0, 2)), "", impls, "", costs]


def _table(title: str, *columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    return table
