"""`python -m examples.train_nanogpt`: train a GPT on a text, with Burnish or without, or each way to compare them.

python -m examples.train_nanogpt --out runs/tiny
python -m examples.train_nanogpt --out runs/tiny --resume
python -m examples.train_nanogpt --out runs/compared --how eager --how compile --how burnish
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from burnish.cli.app import one_line
from burnish.plot import check_plot
from examples.checkpoints import RECORD
from examples.comparing import LOSSES, PICTURE, compare, draw, median_seconds
from examples.gpt import PRESETS
from examples.options import BATCHES, DTYPES, HOW, Options
from examples.text import SHIPPED, read_text
from examples.training import Trainer, resume, start, train

PROMPT = "LOVE, n.  "

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
_show = partial(Console(highlight=False).print, soft_wrap=True)


@app.command()
def train_nanogpt(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, tokenizer, losses.")],
    resumed: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out, by its own options.")] = False,
    how: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(HOW)}: torch.compile with its own backend or with Burnish's, burnish.optimize. "
            "Several: a run each, in folders of these names, and their losses in one picture. One of them twice: "
            "again, as NAME-2, to see by how much runs that are alike differ."
        ),
    ] = ["burnish"],  # noqa: B006  (typer copies it)
    preset: Annotated[str, typer.Option(help=f"The model's size: {', '.join(PRESETS)}.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Steps in all; the learning rate falls over them.")] = 300,
    batch: Annotated[int, typer.Option(help="Rows in a batch.", show_default="the preset's")] = 0,
    tokens: Annotated[int, typer.Option("--context", help="Tokens in a row.", show_default="the preset's")] = 0,
    vocab: Annotated[int, typer.Option(help="Tokens that the tokenizer learns.")] = 1024,
    lr: Annotated[float, typer.Option(help="The highest learning rate, after warming up.")] = 1e-3,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)} by autocast; weights stay float32.")] = "float32",
    dropout: Annotated[float, typer.Option(help="Probability, in attention and after each branch.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: CUDA where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Decides weights, batches and dropout.")] = 0,
    text: Annotated[Path, typer.Option(help="What is learned, UTF-8.", show_default=SHIPPED.name)] = SHIPPED,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at the text held out.")] = 100,
) -> None:
    """Train a GPT on a text, with Burnish or without, and let it write a little."""
    given = {name: value for name, value in context.params.items() if _was_typed(context, name)}
    values: dict[str, Any] = {
        "preset": preset,
        "steps": steps,
        "batch": batch if "batch" in given else BATCHES.get(preset, 1),
        "context": tokens if "tokens" in given or preset not in PRESETS else PRESETS[preset].context,
        "vocab": vocab,
        "lr": lr,
        "dtype": dtype,
        "dropout": dropout,
        "device": ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        "seed": seed,
        "save_every": save_every,
        "evaluate_every": evaluate_every,
    }
    typed = {"context" if name == "tokens" else name for name in given} & values.keys()
    if device == "auto":
        typed.discard("device")
    asked = {run: Options(how=one, **values) for run, one in _named(how).items()}
    read = read_text(text)
    if len(asked) == 1:
        ((one, options),) = asked.items()
        if "how" in given:
            typed.add("how")
        _run(out, options, typed, read, must_resume=resumed, may_resume=resumed)
        return
    check_plot(out / PICTURE)
    runs = {}
    for one, options in asked.items():
        torch.compiler.reset()
        gc.collect()  # or the run before takes memory yet
        _show(f"[bold]{one}[/bold]")
        runs[one] = _run(out / one, options, typed, read, must_resume=False, may_resume=resumed).run
    compare(out / LOSSES, runs, f"python -m examples.train_nanogpt {shlex.join(sys.argv[1:])}")
    draw(out / LOSSES, out / PICTURE)
    _show(f"{out / LOSSES} and {out / PICTURE}")


def _named(how: Sequence[str]) -> dict[str, str]:
    """The ways by the names of their runs: the second one of a way has a number."""
    named: dict[str, str] = {}
    for one in how:
        count = 1 + list(named.values()).count(one)
        named[one if count == 1 else f"{one}-{count}"] = one
    return named


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _run(folder: Path, options: Options, typed: set[str], text: str, *, must_resume: bool, may_resume: bool) -> Trainer:
    """One run to its end. A resumed one has its own options; those that were `typed` again must be the same."""
    if must_resume or (may_resume and (folder / RECORD).exists()):
        trainer, tokenizer = resume(text, folder)
        _refuse_changes(folder, asdict(options), asdict(trainer.options), typed)
    else:
        trainer, tokenizer = start(options, text, folder)
    options = trainer.options
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    _show(
        f"{options.preset}: {count / 1e6:.1f} M parameters, {len(trainer.tokens.training):,} tokens of text, "
        f"{options.batch} x {options.context} a step, {options.dtype} on {options.device} by {options.how}; "
        f"first call {trainer.run.prepared_s:.1f} s"
    )
    train(trainer, folder, _tell)
    _show(f"the median step took {median_seconds(trainer.run) * 1e3:.1f} ms; all is in {folder}\n")
    _show(trainer.sample(tokenizer, PROMPT), markup=False)
    return trainer


def _refuse_changes(folder: Path, asked: Mapping[str, Any], has: Mapping[str, Any], typed: set[str]) -> None:
    for name in sorted(typed):
        if asked[name] != has[name]:
            raise ValueError(f"--{name.replace('_', '-')} {asked[name]}: the run in {folder} has {has[name]}")


def _tell(trainer: Trainer) -> None:
    run, options = trainer.run, trainer.options
    count, seconds = run.seconds[-1]
    rate = options.batch * options.context / seconds
    line = f"step {run.step:5} of {options.steps}  loss {sum(run.losses[-count:]) / count:.4f}  {rate:9,.0f} tokens/s"
    if run.peak_mib is not None:
        line += f"  {run.peak_mib:,.0f} MiB at most"
    if run.step in run.held_out:
        line += f"  held out {run.held_out[run.step]:.4f}"
    _show(line)


def main(args: Sequence[str] | None = None) -> None:
    """The entry point; an error is one line on stderr and exit code 2."""
    try:
        code = app(args, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("train_nanogpt: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(f"train_nanogpt: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
