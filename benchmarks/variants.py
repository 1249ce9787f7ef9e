"""The ways to run one model that the model groups compare. Each is compiled and called once when it is returned."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import burnish

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Variant = Callable[[], object]
Inputs = Mapping[str, Tensor]
Builder = Callable[[nn.Module, Inputs], Variant]


def eager(model: nn.Module, inputs: Inputs) -> Variant:
    return lambda: model(**inputs)


def optimized(model: nn.Module, inputs: Inputs) -> Variant:
    """`burnish.optimize` on a copy: it packs weights, and eager must keep its own."""
    fast = burnish.optimize(copy.deepcopy(model))
    fast(**inputs)
    return lambda: fast(**inputs)


def compiled(model: nn.Module, inputs: Inputs) -> Variant:
    """`torch.compile` as it comes."""
    fast = torch.compile(copy.deepcopy(model))
    fast(**inputs)
    return lambda: fast(**inputs)


def frozen(model: nn.Module, inputs: Inputs) -> Variant:
    """`torch.compile` with Inductor's freezing: weights become constants, packed for oneDNN. Inference only."""
    fast = torch.compile(copy.deepcopy(model))
    with torch._inductor.config.patch(freezing=True):  # read when it compiles, which is at the first call
        fast(**inputs)
    return lambda: fast(**inputs)


def onnxruntime(model: nn.Module, inputs: Inputs) -> Variant:
    """An ONNX Runtime session with all its optimizations, as many threads as torch, at fixed sizes: its best case.

    Inputs are NumPy arrays made beforehand, so that no conversion is timed.
    """
    session = _export_session(model, inputs)
    arrays = [tensor.numpy() for tensor in inputs.values()]
    feeds = dict(zip((node.name for node in session.get_inputs()), arrays, strict=True))

    def run() -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def _export_session(model: nn.Module, inputs: Inputs) -> InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of every operator set that is not installed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(model, (), str(path), kwargs=dict(inputs), dynamo=True, verbose=False)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def for_dtype(dtype: torch.dtype) -> dict[str, Builder]:
    """The variants that run in this dtype, eager first."""
    variants: dict[str, Builder] = {
        "eager": eager,
        "burnish": optimized,
        "torch.compile": compiled,
        "torch.compile + freezing": frozen,
    }
    if dtype == torch.float32:  # ONNX Runtime's CPU kernels for these operators take no bfloat16
        variants["onnxruntime"] = onnxruntime
    return variants
