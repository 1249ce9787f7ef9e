"""`to_onnx`: a module, one of its submodules, or a decode step as an ONNX file that ONNX Runtime was checked on."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from burnish.onnx.errors import OnnxError
from burnish.onnx.file import OnnxFile
from burnish.onnx.source import source_of

OPSETS = range(18, 24)
"""The versions of ONNX's operators that torch's exporter writes."""


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    kwargs: Mapping[str, Any] | None = None,
    *,
    submodule: str | None = None,
    decode: bool = False,
    fused: bool = True,
    opset: int = 20,
    check: bool = True,
    external_data: bool | None = None,
) -> OnnxFile:
    """Writes `model` to `path` as ONNX, by torch's own exporter; batch and sequence sizes are free where the model
    leaves them free.

    Args:
        model: any nn.Module in eval mode; it stays as it is.
        args, kwargs: example inputs, as for a call.
        submodule: the path of a submodule, "model.layers.0.mlp": that alone, with the inputs that it gets from these.
        decode: a step of a Hugging Face language model, with the keys and values of the past as inputs and outputs
            (see `burnish.onnx.decode.DecodeStep`). `args` and `kwargs` give `input_ids` and `attention_mask`.
        fused: what `optimize` fuses become functions in the domain "burnish", whose bodies are standard operators that
            every runtime can run. False: the model in standard operators as torch's exporter knows it.
        opset: the version of ONNX's operators, 18 to 23; with 23 its own Attention, RMSNormalization and
            RotaryEmbedding.
        check: run the file in ONNX Runtime at the example's sizes and at others, and compare by the rule of
            `burnish.numerics`. What differs is not written.
        external_data: weights in a file of their own beside it, "<path>.data"; None: where they do not fit into one.

    Raises:
        ValueError, TypeError: an argument that cannot be.
        CaptureError: the model cannot be captured as one graph.
        OnnxError: a part of it has no form in ONNX, or ONNX Runtime computes something else.
    """
    _need(["onnx_ir", "onnxscript", *(["onnxruntime"] if check else [])])
    if opset not in OPSETS:
        raise ValueError(f"opset={opset}: it must be from {OPSETS[0]} to {OPSETS[-1]}")
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {path.absolute().parent}")
    source = source_of(model, args, kwargs, submodule, decode)

    from burnish.onnx.write import write

    return write(source, path, fused, opset, check, external_data)


def _need(libraries: list[str]) -> None:
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise OnnxError(f"not installed: {', '.join(missing)}; pip install 'burnish[onnx]'")
