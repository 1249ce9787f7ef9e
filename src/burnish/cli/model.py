"""`burnish optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    ModelArgument,
    Padding,
    PaddingOption,
    QuantizeOption,
    SeqOption,
    TextOption,
    load_model,
    parse_impls,
)
from burnish.cli.words import check_writable, heading, loading

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
    factory: FactoryOption = None,
    impl: ImplOption = None,
    quantize: QuantizeOption = None,
    padding: PaddingOption = Padding.keep,
    verify: VerifyOption = True,
    cache: CacheOption = CacheMode.readwrite,
    save_report: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Optimize a model and show what was done, what it brought, and what almost matched."""
    output = Output(as_json)
    check_writable(save_report, "--save-report")
    with output.working("starting PyTorch") as update:
        impls = parse_impls(impl)
        update(loading(model))
        loaded = load_model(model, batch, seq, text, dtype, layers, device, factory)
        update(f"optimizing {model}: capture, rewrite, measure, verify")
        import burnish

        kind, measured_on, slow = None if quantize is None else quantize.kind, None, None
        fast = burnish.optimize(
            loaded.model, loaded.args, loaded.kwargs, verify=verify, impls=impls, cache=cache.mode, quantize=kind,
            padding=padding.value,
        )  # fmt: skip
        if kind is not None:
            from burnish.cli.quantizing import measure_perplexity, why_slow

            slow = why_slow(kind, loaded)
            update(f"measuring the perplexity of {model}")
            measured_on = measure_perplexity(fast, loaded)
        report = fast.report()
    output.data({"name": model, "origin": loaded.origin, **report.to_dict()})
    output.show(heading(loaded), "", report)
    if measured_on is not None:
        output.show("", f"Perplexity is of {measured_on}.")
    if slow is not None:
        output.show("", f"{slow}.")
    if save_report is not None:
        report.to_json(save_report)
        output.show("", f"The report is in {save_report}.")
