"""The peers of a model: itself, torch.compile, PyTorch's attention by each backend, ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from burnish.peers.op import by_backend, compiled

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX_RUNTIME = "onnxruntime"
_ERRORS = 3  # what ONNX Runtime logs, from which severity on


def model_peers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    compile_modes: Sequence[str] = (),
    sdpa: bool = False,
    onnx: bool = False,
) -> tuple[dict[str, Callable[..., object]], dict[str, str]]:
    """The ways to run the model without Burnish, eager first, and why each other one that was asked for cannot.

    sdpa: PyTorch's attention by each of its backends, where the model calls it. onnx: exported, in ONNX Runtime.
    """
    variants: dict[str, Callable[..., object]] = {"eager": model}
    missing: dict[str, str] = {}
    variants |= compiled(model, compile_modes)
    if sdpa and calls_sdpa(model, args, kwargs):
        able, missing = by_backend(partial(model, **kwargs), args)
        variants |= able
    elif sdpa:
        missing["sdpa"] = f"{type(model).__name__} does not call scaled_dot_product_attention"
    if onnx:
        try:
            variants[ONNX_RUNTIME] = in_onnx_runtime(model, args, kwargs)
        except Exception as error:  # the exporter's and the runtime's own kinds of errors are many
            missing[ONNX_RUNTIME] = " ".join(str(error).split())[:200] or type(error).__name__
    return variants, missing


def calls_sdpa(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass calls F.scaled_dot_product_attention."""

    class Watching(TorchFunctionMode):
        seen = False

        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.seen |= function is F.scaled_dot_product_attention
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watching() as watching:
        model(*args, **kwargs)
    return watching.seen


def in_onnx_runtime(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., object]:
    """The model as `burnish.to_onnx` writes it without functions, in ONNX Runtime with all its optimizations for these
    sizes, on as many threads as torch.

    What is called takes the model's own inputs and reads none of them: they are the session's already, on its device,
    so that no conversion is timed. ImportError where a package is missing; what `to_onnx` raises.
    """
    try:
        import onnxruntime

        from burnish.onnx import to_onnx
    except ImportError:
        raise ImportError("pip install 'burnish[onnx]'") from None
    leaves = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(model, args, Path(folder, "model.onnx"), kwargs, fused=False, check=False)
        session = _session(onnxruntime, file.path, leaves)
    device = "cuda" if session.get_providers()[0].startswith("CUDA") else "cpu"
    if any(leaf.is_cuda for leaf in leaves) and device == "cpu":
        raise RuntimeError("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    binding = session.io_binding()
    for described, leaf in zip(session.get_inputs(), leaves, strict=True):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(leaf.cpu().numpy(), device, leaf.device.index or 0)
        binding.bind_ortvalue_input(described.name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def run(*args: Any, **kwargs: Any) -> object:
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    run()
    return run


def _session(onnxruntime: Any, path: Path, leaves: Sequence[Tensor]) -> InferenceSession:
    """The file for inputs of these sizes alone, which is its best case: what is computed from sizes is computed now."""
    import onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS
    given = onnx.load(path, load_external_data=False).graph.input
    for described, leaf in zip(given, leaves, strict=True):
        for dim, size in zip(described.type.tensor_type.shape.dim, leaf.shape, strict=True):
            if dim.dim_param:
                options.add_free_dimension_override_by_name(dim.dim_param, size)
    wanted = ["CUDAExecutionProvider"] if any(leaf.is_cuda for leaf in leaves) else []
    able = onnxruntime.get_available_providers()
    providers = [provider for provider in (*wanted, "CPUExecutionProvider") if provider in able]
    return onnxruntime.InferenceSession(path, options, providers=providers)
