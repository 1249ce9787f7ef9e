"""`burnish generate`: text, or token ids, as it comes, and what a token took."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import JsonOption, Output, app
from burnish.cli.generating import Asked, Generator, print_rows
from burnish.cli.options import (
    CacheMode,
    CacheOption,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelArgument,
    QuantizeOption,
    load_model,
    resolve_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.models import Loaded

_PROMPT, _CHOICE = "The prompt", "How a token is chosen"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call them
_INPUTS = {"input_features": "audio", "input_values": "audio", "pixel_values": "pictures"}


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to go on from, or a source to write after; repeatable.", rich_help_panel=_PROMPT),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Without --prompt: rows of made-up tokens (1).", rich_help_panel=_PROMPT)
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=1, help="Without --prompt: tokens in a row (128).", rich_help_panel=_PROMPT)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each row, at the most.")] = 64,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a row where this string is in its new text; repeatable.")
    ] = None,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            help="Draw the tokens, or take the likeliest; default: what the model's generation config says.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, rich_help_panel=_CHOICE)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 keeps all.", rich_help_panel=_CHOICE)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_CHOICE)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, rich_help_panel=_CHOICE)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, rich_help_panel=_CHOICE)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same one draws the same tokens.", rich_help_panel=_CHOICE)
    ] = None,
    dtype: DtypeOption = None,
    layers: LayersOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    cache: CacheOption = CacheMode.readwrite,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print all at the end: the host waits for no token.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate text (without --prompt: token ids after made-up ones) and show what a token took."""
    output = Output(as_json)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = _options(model, prompt, batch, seq, stop, sample, drawn)
    options |= {"max_new_tokens": max_new_tokens}
    options |= {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    with output.working("starting PyTorch") as update:
        target = resolve_device(device)
        update(f"measuring {target}")
        from burnish.hardware import device as describe

        here = describe(target)
        update(f"loading {model}")
        loaded = load_model(model, batch, seq if prompt is None else 1, None, dtype, layers, device)
        _check_generates(loaded)
        tokenizer = _tokenizer(model) if prompt is not None else None
        asked = _asked(loaded, prompt, tokenizer, options, stop, secrets.randbelow(2**31) if seed is None else seed)
        update(f"optimizing {model}: capture, rewrite, measure, verify")
        generator = Generator.of(loaded, asked, cache, None if quantize is None else quantize.kind)
        weights = _weights_of_a_step(loaded.model, generator.weights_of_a_step)
        weights = None if weights is None else weights - generator.bytes_saved
    streams = not (no_stream or as_json or generator.left_to_hugging_face) and asked.input_ids.shape[0] == 1
    made = generator.run(streams)
    output.data({"name": model, "origin": loaded.origin, **made.data(here, weights)})
    if not streams and not as_json:
        print_rows(made)
    if not as_json:
        print("", *made.lines(here, weights), sep="\n", file=sys.stderr)


def _options(
    model: str,
    prompt: Sequence[str] | None,
    batch: int | None,
    seq: int | None,
    stop: Sequence[str] | None,
    sample: bool | None,
    drawn: dict[str, Any],
) -> dict[str, Any]:
    """What is handed on to `generate` of how a token is chosen; an error where options contradict each other."""
    given = {name: value for name, value in drawn.items() if value is not None}
    if sample is False and given:
        name = next(iter(given)).replace("_", "-")
        raise typer.BadParameter(f"--{name} is for tokens that are drawn; leave it or --greedy out")
    if prompt is None and stop:
        raise typer.BadParameter("--stop: made-up tokens have no text to find it in; give a --prompt")
    if prompt is not None:
        for option, value, why in (("--batch", batch, "each prompt is a row"), ("--seq", seq, "a prompt has a length")):
            if value is not None:
                raise typer.BadParameter(f"{option} is of made-up tokens, and {why}; leave it out")
        for option, texts in (("--prompt", prompt), ("--stop", stop or ())):
            if "" in texts:
                raise typer.BadParameter(f"{option}: an empty text will not do")
        from burnish.models import PRESETS

        if model in PRESETS and PRESETS[model].writes_text:
            raise typer.BadParameter(f"--prompt: {model} has random weights and no tokenizer; use a folder or a hub id")
        if ":" in model and not Path(model).is_dir():
            raise typer.BadParameter(f"--prompt: there is no tokenizer for {model}; leave it out for made-up tokens")
    if sample is None and not given:
        return given
    return given | {"do_sample": sample is not False, "num_beams": 1}


def _check_generates(loaded: Loaded) -> None:
    """ModelError for a model that has no next token to give."""
    from burnish.models import ModelError

    model: Any = loaded.model
    kind = type(model).__name__
    if not hasattr(model, "can_generate"):
        raise ModelError(f"{loaded.name}: {kind} is no Hugging Face model; only those generate here")
    if not model.can_generate():
        raise ModelError(f"{loaded.name}: {kind} does not generate text")
    if (name := model.main_input_name) != "input_ids":
        raise ModelError(
            f"{loaded.name}: {kind} reads {_INPUTS.get(name, name)}, and text is all that can be given here; in Python "
            f"burnish.optimize(model).generate({name}=...) would do"
        )


def _tokenizer(model: str) -> Any:
    from burnish.models import ModelError, quiet_transformers

    with quiet_transformers() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"--prompt: {model} has no tokenizer that can be loaded; without --prompt tokens are made up"
            ) from error


def _weights_of_a_step(model: Any, read: Collection[str]) -> int | None:
    """Bytes of the weights that a step reads; None where they depend on the token. Tables of embeddings are only looked
    up in, unless one of them is the last product's weight as well.

    read: what a step's graph reads, by name: of an encoder-decoder not what only the source goes through.
    """
    from torch import nn

    if any(getattr(model.config, name, None) for name in _EXPERTS):
        return None
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(getattr(head, "weight", None))}
    weights = dict(model.named_parameters(remove_duplicate=False))
    if model.config.is_encoder_decoder:
        if not read:
            return None
        weights = {name: weights[name] for name in read if name in weights}
    once = {id(weight): weight for weight in weights.values() if id(weight) not in tables}
    return sum(weight.numel() * weight.element_size() for weight in once.values())


def _asked(
    loaded: Loaded,
    prompts: Sequence[str] | None,
    tokenizer: Any,
    options: dict[str, Any],
    stop: Sequence[str] | None,
    seed: int,
) -> Asked:
    model: Any = loaded.model
    config = model.generation_config
    eos = () if config.eos_token_id is None else config.eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    if prompts is None:
        ids, mask = _made_up(loaded)
    else:
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
        ids, mask = _tokenized(loaded, prompts, tokenizer, pad)
    samples = bool(options.get("do_sample", config.do_sample))
    prompts = None if prompts is None else tuple(prompts)
    has_encoder = bool(model.config.is_encoder_decoder)
    asked = Asked(ids, mask, prompts, tokenizer, options, seed, samples, eos, tuple(stop or ()), has_encoder)
    _check_room(loaded, asked)
    return asked


def _check_room(loaded: Loaded, asked: Asked) -> None:
    """ModelError where the model has not positions enough."""
    from burnish.models import ModelError

    config: Any = loaded.model.config
    longest = getattr(config, "max_target_positions", getattr(config, "max_position_embeddings", None))
    if not isinstance(longest, int):
        return
    has, length = f"{loaded.name} has positions for {longest} tokens", asked.input_ids.shape[1]
    if length > longest or (length == longest and not asked.has_encoder):
        option = "--seq" if asked.prompts is None else "--prompt"
        raise ModelError(f"{option}: {has}, {length} of them for the prompt; give a shorter one")
    new, first = asked.options["max_new_tokens"], asked.first_new
    if first + new > longest:
        what = "the start" if asked.has_encoder else "the prompt"
        raise ModelError(f"--max-new-tokens={new}: {has}, {first} of them for {what}; give {longest - first} or less")


def _made_up(loaded: Loaded) -> tuple[Tensor, Tensor | None]:
    from torch import Tensor

    from burnish.models import ModelError

    ids = loaded.kwargs.get("input_ids", loaded.args[0] if loaded.args else None)
    if not (isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()):
        raise ModelError(f"{loaded.name}: its inputs have no input_ids of (batch, length)")
    return ids, loaded.kwargs.get("attention_mask")


def _tokenized(loaded: Loaded, prompts: Sequence[str], tokenizer: Any, pad: int) -> tuple[Tensor, Tensor | None]:
    """The prompts, padded on the left; before an encoder on the right, where its positions are those it has learned."""
    from burnish.models import ModelError

    model: Any = loaded.model
    rows = [tokenizer(text)["input_ids"] for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if not row:
            raise ModelError(f"--prompt: {loaded.name} has no tokens for {text!r}")
    on_right = bool(model.config.is_encoder_decoder)
    ids = _padded(rows, pad, on_right)
    mask = _padded([[1] * len(row) for row in rows], 0, on_right)
    target = next(model.parameters()).device
    return ids.to(target), None if bool(mask.all()) else mask.to(target)


def _padded(rows: Sequence[list[int]], pad: int, on_right: bool) -> Tensor:
    import torch

    longest = max(map(len, rows))
    missing = [[pad] * (longest - len(row)) for row in rows]
    return torch.tensor([row + more if on_right else more + row for row, more in zip(rows, missing, strict=True)])
