"""From a module with inputs to a file: captured, rewritten, converted, written, checked, and only then put in its
place."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish import __version__
from burnish.capture import Program, capture
from burnish.onnx.check import Checked, Checker, Sizes
from burnish.onnx.convert import convert
from burnish.onnx.errors import OnnxError
from burnish.onnx.file import OnnxFile
from burnish.onnx.names import name_all, size_names
from burnish.onnx.source import Source
from burnish.rewrites import FUSE, RAISE, apply
from burnish.verify import random_node

_ONE_FILE = 2_000_000_000  # bytes: Protocol Buffers end at 2 GiB
# These serve kernels for CUDA; a file is to be the same wherever it is made.
_NOT_FOR_FILES = {"linear_add_norm", "linear_rope", "norm prologue"}


def write(source: Source, path: Path, fused: bool, opset: int, check: bool, external_data: bool | None) -> OnnxFile:
    """See `burnish.to_onnx`."""
    started = time.perf_counter()
    program = _program(source, fused)
    leaves = pytree.tree_leaves((source.args, source.kwargs))
    names = source.inputs or [spec.name for spec in program.inputs if spec.is_tensor]
    inputs = dict(zip(names, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True))
    words = size_names(program, inputs, source.axes)
    sizes = Sizes(program, leaves, words)
    converted = convert(program, sizes.inputs({}, least=2), opset, source.prefix)
    converted.model.producer_name, converted.model.producer_version = "burnish", __version__
    graph = converted.model.graph
    graph.name = type(source.module).__name__
    name_all(converted.model, program, inputs, words)
    if external_data is None:
        external_data = sum(_bytes(value) for value in graph.initializers.values()) > _ONE_FILE
    data = path.with_name(f"{path.name}.data") if external_data else None
    checked: list[Checked] = []
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}-") as folder:
        written = Path(folder, path.name)
        ir.save(converted.model, written, external_data=data and data.name)
        if check:
            checker = Checker(written, source.module, program, converted)
            checked = [checker.check(sizes.inputs(each), each) for each in sizes.to_check(source.more_sizes)]
        if data is not None:
            written.with_name(data.name).replace(data)
        written.replace(path)
    return OnnxFile(
        path,
        data,
        opset,
        sum(file.stat().st_size for file in (path, data) if file is not None),
        _described(graph.inputs),
        _described(graph.outputs),
        _counted(node for _, node in converted.calls),
        _counted(node for node in graph if not node.domain),
        _counted(inner for _, node in converted.calls for inner in converted.body(node)),
        tuple(checked),
        time.perf_counter() - started,
    )


def _program(source: Source, fused: bool) -> Program:
    program = capture(source.module, source.args, source.kwargs, attention_interface=fused)
    if name := random_node(program.captured.graph):
        raise OnnxError(f"{name} draws random numbers, which no two runtimes draw alike")
    if fused:
        apply("raise", RAISE, program.graph_module)
        apply("fuse", [rewrite for rewrite in FUSE if rewrite.name not in _NOT_FOR_FILES], program.graph_module)
    return program


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _described(values: Iterable[ir.Value]) -> dict[str, str]:
    return {str(v.name): f"{v.dtype and v.dtype.numpy()}[{', '.join(map(str, v.shape or ()))}]" for v in values}


def _counted(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """How often each operator occurs, most frequent first; constants are none."""
    return dict(Counter(node.op_type for node in nodes if node.op_type != "Constant").most_common())
