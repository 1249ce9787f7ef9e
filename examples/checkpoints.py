"""A training run on disk: `run.json` with the numbers, and a safetensors file with weights, optimizer and generators.

Nothing is pickled, so a run from elsewhere can be read without running what is in it. `run.json` names the tensors that
belong to it and is replaced last, at once: whatever interrupts a save, the folder holds a whole checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish._files import write_text
from examples.options import Options

FORMAT = 1
RECORD, TOKENIZER = "run.json", "tokenizer.json"


@dataclass
class Run:
    """What a run has done so far.

    Attributes:
        options: what was asked for.
        text_sha256: of the text, to tell another one from it.
        losses: the training loss of each step so far, in nats.
        held_out: the loss on text held out, by the number of steps before it.
        seconds: for each stretch of steps, how many steps and how long one took on average.
        prepared_s: seconds of the first call, in which is compiled.
        peak_mib: the most memory that tensors took on the GPU during a step, None on a CPU.
    """

    options: Options
    text_sha256: str
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: list[tuple[int, float]] = field(default_factory=list)
    prepared_s: float = 0.0
    peak_mib: float | None = None

    @property
    def step(self) -> int:
        return len(self.losses)


def save(folder: Path, run: Run, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint; the one before is deleted once this one counts."""
    name = f"step-{run.step:06d}.safetensors"
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        save_file(dict(tensors), temporary)
        temporary.chmod(0o644)  # it is 0600, which is not what the record beside it is
        temporary.replace(folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    record = {"format": FORMAT, "tensors": name, **asdict(run)}
    write_text(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    for old in folder.glob("step-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(folder: Path) -> tuple[Run, dict[str, Tensor]]:
    """The checkpoint in a folder. ValueError for what `save` did not write, in one line that names the file."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no run in it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    try:
        name, run = _parsed(record)
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {said}") from None
    try:
        return run, load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / name}: {error}") from None


def _parsed(record: Any) -> tuple[str, Run]:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"not a run in format {FORMAT}")
    expected = {"format", "tensors", *(each.name for each in fields(Run))}
    if record.keys() != expected:
        raise ValueError(f"its keys differ from a run's: {', '.join(sorted(record.keys() ^ expected))}")
    run = Run(
        options=Options.parse(record["options"]),
        text_sha256=str(record["text_sha256"]),
        losses=[_number(loss) for loss in record["losses"]],
        held_out={int(step): _number(loss) for step, loss in record["held_out"].items()},
        seconds=[(int(steps), _number(seconds)) for steps, seconds in record["seconds"]],
        prepared_s=_number(record["prepared_s"]),
        peak_mib=None if record["peak_mib"] is None else _number(record["peak_mib"]),
    )
    if not 0 < run.step <= run.options.steps:
        raise ValueError(f"it has {run.step} losses of {run.options.steps} steps")
    name = record["tensors"]
    if name != f"step-{run.step:06d}.safetensors":  # which also keeps it from naming a file elsewhere
        raise ValueError(f"tensors={name!r} is not the file of step {run.step}")
    return name, run


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
