"""The peers of models: each computes the same, and says why it cannot be timed where it cannot."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish import numerics
from burnish.peers import model_peers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval().requires_grad_(False)


def test_eager_alone_unless_more_is_asked_for(model: nn.Module) -> None:
    assert model_peers(model, (torch.randn(1, 4, 16),), {}) == ({"eager": model}, {})


def test_attention_by_backend(model: nn.Module) -> None:
    x, mask = torch.randn(1, 4, 16), torch.ones(4, 4, dtype=torch.bool)
    variants, missing = model_peers(model, (x,), {"mask": mask}, sdpa=True)
    assert [*variants] == ["eager", "sdpa flash", "sdpa math"]
    assert set(missing) == {"sdpa cudnn", "sdpa efficient"}
    outputs = [variant(x, mask=mask) for variant in variants.values()]
    assert all(numerics.check(output, outputs[0], outputs[0].double()).ok for output in outputs)  # type: ignore[attr-defined]


def test_a_model_without_torchs_attention() -> None:
    variants, missing = model_peers(nn.Linear(4, 4), (torch.randn(1, 4),), {}, sdpa=True)
    assert [*variants] == ["eager"]
    assert missing == {"sdpa": "Linear does not call scaled_dot_product_attention"}


def test_onnx_runtime_computes_the_same(model: nn.Module) -> None:
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    x = torch.randn(2, 5, 16)
    variants, missing = model_peers(model, (x,), {"mask": None}, onnx=True)
    assert not missing
    (found,) = variants["onnxruntime"](x, mask=None)  # type: ignore[misc]
    truth = numerics.oracle(copy.deepcopy(model).double(), x)
    assert numerics.check(torch.from_numpy(found.numpy()), model(x), truth).ok


def test_onnx_runtime_that_cannot(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 16)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert model_peers(model, (x,), {}, onnx=True)[1] == {"onnxruntime": "pip install 'burnish[onnx]'"}

    def export(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.undo()
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    monkeypatch.setattr(torch.onnx, "export", export)
    assert model_peers(model, (x,), {}, onnx=True)[1] == {
        "onnxruntime": "torch's exporter has no form for a part of it: no such operator"
    }
