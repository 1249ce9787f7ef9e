"""The peers of Ops: there for every Op, right, and honest about what is not here."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from burnish.bench import Within
from burnish.numerics import check, oracle
from burnish.op import OPS
from burnish.ops import gated_mlp
from burnish.peers import SIZED, default_sizes, op_peers, sized_arguments
from burnish.peers import op_sizes as sizes
from burnish.peers.op import _why_no_kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.LAYERS, "cpu", sizes.Layer(width=32, inner=48, heads=4, key_heads=2, head_dim=8))


def test_every_op_has_sizes() -> None:
    assert set(SIZED) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_eager_computes_what_the_op_does_at_every_size(name: str) -> None:
    op = OPS[name]
    for size in (2, default_sizes(name, CPU)[0], 64):
        bound = op.bind(*sized_arguments(name, size, CPU, torch.float32))
        op.check(*bound)
        variants, _ = op_peers(name, bound)
        truth = oracle(op.reference, *bound)
        # Both in float64, so that only a difference in meaning is left; judged in float32: their sums differ in order.
        found, expected = tree_map(Tensor.float, (oracle(variants["eager"], *bound), truth))
        verdict = check(found, expected, truth)
        assert verdict.ok, verdict.reason


def test_sizes_are_sizes() -> None:
    for name in OPS:
        few, many = (
            sum(value.nbytes for value in sized_arguments(name, size, CPU, torch.float32) if isinstance(value, Tensor))
            for size in (64, 128)
        )
        assert few < many, name


def test_attention_by_each_backend_that_there_is() -> None:
    args = OPS["attention"].bind(*sized_arguments("attention", 6, CPU, torch.float32))
    variants, missing = op_peers("attention", args)
    assert [*variants] == ["eager", "sdpa flash", "sdpa math"]
    assert set(missing) == {"sdpa cudnn", "sdpa efficient"}
    flash = variants["sdpa flash"]
    assert isinstance(flash, Within)
    with flash.context():
        assert not torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_what_a_kernel_lacks_is_read_from_the_warnings() -> None:
    said = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:1)",
        "Expected query, key and value to be of dtype: {Half, BFloat16}. (Triggered internally at x.cpp:2)",
        "Memory efficient attention has been runtime disabled. (Triggered internally at x.cpp:3)",
    ]
    assert _why_no_kernel(said) == "Expected query, key and value to be of dtype: {Half, BFloat16}"
    assert _why_no_kernel([]) == "there is none for these inputs on this device"


def test_compile_modes_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda fn, mode, dynamic: asked.append((mode, dynamic)) or fn)
    variants, _ = op_peers("linear", (), ["default", "max-autotune"])
    assert [*variants] == ["eager", "torch.compile", "torch.compile max-autotune"]
    assert asked == [(None, False), ("max-autotune", False)]


def test_liger_says_why_it_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = gated_mlp.bind(*sized_arguments("gated_mlp", 2, CPU, torch.float32))
    assert op_peers("gated_mlp", args)[1] == {"liger": "its kernels are for CUDA"}
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert op_peers("gated_mlp", args)[1] == {"liger": "pip install liger-kernel"}


def test_liger_is_called_as_the_op_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need CUDA; here its function is put in their place."""

    class LigerSiLUMulFunction:
        @staticmethod
        def apply(gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(gate) * up

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops.swiglu")
    module.LigerSiLUMulFunction = LigerSiLUMulFunction  # type: ignore[attr-defined]
    for name, value in (("liger_kernel", package), ("liger_kernel.ops", package), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, value)
    args = gated_mlp.bind(*sized_arguments("gated_mlp", 2, CPU, torch.float32))
    with monkeypatch.context() as on_cuda:
        on_cuda.setattr(Tensor, "is_cuda", True)
        variants, missing = op_peers("gated_mlp", args)
    assert not missing
    expected = gated_mlp.reference(*args)
    assert check(variants["liger"](*args), expected, expected.double()).ok
