"""`python -m benchmarks.predictions`: what `burnish.explain(model, target="h200")` predicts for the models that were
measured there, into results/nvidia-h200/predictions.json. It needs no GPU and takes some minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import burnish
from benchmarks import blocks, encoder, prefill
from benchmarks.runner import RESULTS
from burnish._files import write_text
from burnish.bench import load_records
from tests import zoo
from tests.zoo.case import hidden, seeded

TARGET = "h200"
FOLDER = RESULTS / "nvidia-h200"
GROUPS = ("encoder", "blocks", "prefill")
NEAR = 0.25  # of the measured time: what a prediction has to meet


def models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """The cases of GROUPS, without weights: name, model and inputs."""
    bert = zoo.BIG["bert-base"]
    for batch, seq in encoder.SHAPES:
        model = bert.build().to("meta", torch.float16)
        yield f"bert-base-fp16-b{batch}-s{seq}", model, _on_meta(bert.inputs(batch, seq, torch.float16))
    for name, (build, width, batch, seq) in blocks.BLOCKS.items():
        x, mask = hidden(batch, seq, width, torch.bfloat16), torch.ones(seq, seq, dtype=torch.bool)
        yield name, seeded(build()).to("meta", torch.bfloat16), _on_meta({"x": x, "mask": mask})
    for name in prefill.MODELS:
        for seq in (512, 2048):
            model, inputs = prefill.llama(name, seq, device="meta")
            yield f"{name}-prefill-b1-s{seq}", model, _on_meta(inputs)


def _on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}


def predict(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """Microseconds and kernels of one call, optimized."""
    explanation = burnish.explain(model, (), inputs, target=TARGET).explanation
    assert explanation is not None
    assert explanation.after is not None
    return {"us": round(explanation.after.end_to_end_us, 1), "kernels": explanation.after.launches}


def measured(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The records of the optimized models, by case."""
    records = [record for group in GROUPS for record in load_records(folder / f"{group}.json")]
    return {record["case"]: record for record in records if record["variant"] == "burnish"}


def main() -> None:
    """Predict each case, and write them all."""
    found = {}
    for name, model, inputs in models():
        found[name] = predict(model, inputs)
        was = measured()[name]["median_us"]
        print(f"{name}: {found[name]['us']:,.1f} us predicted, {was:,.1f} measured, {found[name]['us'] / was - 1:+.1%}")
    data = {
        "target": TARGET,
        "groups": GROUPS,
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.predictions",
        "cases": found,
    }
    write_text(FOLDER / "predictions.json", json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
