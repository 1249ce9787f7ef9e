"""ONNX Runtime on the CPU, from PyTorch tensors to PyTorch tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from burnish.onnx.errors import OnnxError

_BFLOAT16 = 16  # as ONNX counts dtypes; numpy has none


def open_session(path: Path, options: Any = None) -> Any:
    """An ONNX Runtime session on the CPU. OnnxError where it refuses the file."""
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise OnnxError(f"ONNX Runtime {onnxruntime.__version__} refuses {path.name}: {_reason(error)}") from error


def run(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The session's outputs for these inputs, in order. OnnxError where it fails."""
    names = [value.name for value in session.get_inputs()]
    feeds = {name: _to_ort(tensor) for name, tensor in zip(names, inputs, strict=True)}
    try:
        return [_from_ort(value) for value in session.run_with_ort_values(None, feeds)]
    except Exception as error:
        sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(names, inputs, strict=True))
        raise OnnxError(f"ONNX Runtime fails on {sizes}: {_reason(error)}") from error


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == _BFLOAT16:
        return from_dlpack(value)
    return torch.from_numpy(value.numpy())


def _to_ort(tensor: Tensor) -> Any:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _reason(error: BaseException) -> str:
    """What ONNX Runtime says, without its numbers and the place of a file that is not where it will be."""
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: ?", "", text)[:400]
