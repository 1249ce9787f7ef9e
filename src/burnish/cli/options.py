"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from burnish.cli.words import as_typed

if TYPE_CHECKING:
    import torch

    from burnish.models import Loaded


class Dtype(str, Enum):
    """The dtypes that models are run in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        from burnish.models import DTYPES

        return DTYPES[self.value]


class CacheMode(str, Enum):
    """What is done with the choices that earlier runs measured."""

    readwrite = "readwrite"
    readonly = "readonly"
    off = "off"

    @property
    def mode(self) -> Literal["readwrite", "readonly", "off"]:
        return self.value


class Quantize(str, Enum):
    """How weights may be quantized."""

    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"

    @property
    def kind(self) -> Literal["int8", "int4", "fp8"]:
        return self.value


class Padding(str, Enum):
    """What is done with padding."""

    keep = "keep"
    remove = "remove"


_INPUTS = "Inputs"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset (minilm, bert-base, bert-large, gpt2, llama-3.2-1b, llama-3-8b, t5-small, vit-base, "
        "whisper-tiny), a Hugging Face folder or hub id, package.module:factory, or what `burnish isolate` wrote.",
        show_default=False,
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Rows of the made-up inputs (1).", rich_help_panel=_INPUTS)
]
SeqOption = Annotated[int | None, typer.Option(min=1, help="Tokens in a row (128).", rich_help_panel=_INPUTS)]
TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="Real input: a text to tokenize; repeat it for more rows.", rich_help_panel=_INPUTS),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and inputs (fp32, or a factory's own).")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Build a preset with fewer layers.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1; default: CUDA where there is one.", show_default=False)
]
FactoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION",
        help="Builds the model around an isolated submodule whose code is your own.",
        show_default=False,
    ),
]
CacheOption = Annotated[CacheMode, typer.Option(help="Choices that were measured before.")]
PaddingOption = Annotated[
    Padding, typer.Option(help="Compute padding, too, or real tokens alone: texts of unequal lengths have padding.")
]
QuantizeOption = Annotated[
    Quantize | None, typer.Option(help="Read weights in so many bits, and show what that changes.", show_default=False)
]
ImplOption = Annotated[
    list[str] | None,
    typer.Option("--impl", metavar="OP=IMPL", help="Run this Op by this Impl, whatever is faster; repeatable."),
]


def resolve_device(name: str | None, typed: str = "--device") -> torch.device:
    """The torch device of that name, CUDA or else the CPU for None; an error for one that is not here, which calls it
    as it was `typed`."""
    import torch

    from burnish.hardware import device

    with as_typed(target=typed):
        kind = device(name, measure=False).kind
    return torch.device(name if name is not None else kind)


def parse_impls(pairs: list[str] | None) -> dict[str, str]:
    """`["attention=torch_flash"]` as a dict; both names are checked."""
    from burnish.op import find_impl

    impls = {}
    for pair in pairs or []:
        op, equals, impl = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--impl {pair}: write OP=IMPL, such as attention=torch_flash")
        find_impl(op, impl)
        impls[op] = impl
    return impls


def load_model(
    name: str,
    batch: int | None,
    seq: int | None,
    text: list[str] | None,
    dtype: Dtype | None,
    layers: int | None,
    device: str | None,
    factory: str | None = None,
) -> Loaded:
    """The model of the command line with its inputs."""
    from burnish.models import Wanted, load

    torch_dtype = dtype.torch if dtype else None
    return load(name, Wanted(batch, seq, torch_dtype, layers, tuple(text or ()), resolve_device(device), factory))
