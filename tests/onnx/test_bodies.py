"""What an Op's ONNX function computes is what the Op computes: on the Op's own samples, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from burnish import numerics, ops
from burnish.onnx.bodies import body_of
from burnish.onnx.calls import Signature
from burnish.onnx.running import open_session, run
from burnish.op import Op

# Those that can be in a file.
IN_FILES = (
    ops.add_layer_norm,
    ops.add_rms_norm,
    ops.attention,
    ops.embedding_layer_norm,
    ops.gated_mlp,
    ops.layer_norm,
    ops.linear,
    ops.rms_norm,
    ops.rope,
    ops.rope_qk,
    ops.rope_tables,
)


class Bodies(nn.Module):
    """The bodies of several calls of one Op, each on its own arguments."""

    def __init__(self, op: Op, calls: list[tuple[Any, ...]], opset: int) -> None:
        super().__init__()
        self.calls = [(signature(op, call), call) for call in calls]
        self.opset = opset

    def forward(self, *tensors: Tensor) -> list[Any]:
        supplied = iter(tensors)
        results = []
        for made, call in self.calls:
            args = [next(supplied) if isinstance(arg, Tensor) else arg for arg in call]
            results += _tuple(body_of(made, self.opset)(*args))[: made.results]
        return results


def signature(op: Op, args: tuple[Any, ...]) -> Signature:
    named = dict(zip(op.signature.parameters, args, strict=True))
    tensors = tuple((n, t.dtype, tuple(t.shape)) for n, t in named.items() if isinstance(t, Tensor))
    settings = tuple((n, a) for n, a in named.items() if a is not None and not isinstance(a, Tensor))
    alike = all(_halves_alike(named[name]) for name in ("cos", "sin") if name in named)
    results = sum(tuple(result.shape) != (0,) for result in _tuple(op.shape(*args)))
    return Signature(op.name, settings, tensors, results, alike)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _halves_alike(table: Tensor) -> bool:
    one, other = table.chunk(2, dim=-1)
    return torch.equal(one, other)


def in_onnx_runtime(op: Op, calls: list[tuple[Any, ...]], opset: int, folder: Path) -> list[Tensor]:
    tensors = tuple(arg.contiguous() for call in calls for arg in call if isinstance(arg, Tensor))
    with torch.no_grad():
        program = torch.onnx.export(Bodies(op, calls, opset).eval(), tensors, opset_version=opset, verbose=False)
    assert program is not None
    ir.save(program.model, folder / "bodies.onnx")
    return run(open_session(folder / "bodies.onnx"), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", IN_FILES, ids=lambda op: op.name)
def test_body(op: Op, dtype: torch.dtype, opset: int, tmp_path: Path) -> None:
    samples = list(op.samples("cpu", dtype))
    if op is ops.attention and opset == 23 and dtype == torch.float16:
        samples = [sample for sample in samples if sample.label != "large scores"]  # ONNX's own scores are of q's dtype
    calls = [op.bind(*sample.args, **sample.kwargs) for sample in samples]
    found = iter(in_onnx_runtime(op, calls, opset, tmp_path))
    for call, sample in zip(calls, samples, strict=True):
        results = zip(_tuple(op.reference(*call)), _tuple(numerics.oracle(op.reference, *call)), strict=True)
        for expected, exact in (pair for pair in results if tuple(pair[0].shape) != (0,)):
            verdict = numerics.check(next(found), expected, exact)
            assert verdict.ok, f"{sample.label}: {verdict.reason}"
