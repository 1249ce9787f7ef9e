"""An RMS norm in the product for few rows, in the interpreter: sizes, strides, squares, rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import rms_norm_gated_mlp, rms_norm_linear
from burnish.ops._activations import activate

pytest.importorskip("triton")

from burnish.kernels.gemv import Norm, gemv, gemv_configs
from burnish.kernels.launch import Launch, Target, recording
from burnish.kernels.matmul_configs import Product


def _tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return randn(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.25


def _assert_right(
    x: Tensor, scale: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> None:
    args = (x, scale, eps, weight, bias, activation)
    result = gemv(x, weight, bias, activation, norm=Norm(scale, eps))
    assert_close(result, rms_norm_linear.reference(*args), oracle(rms_norm_linear.reference, *args))
    assert result.is_contiguous()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("columns", "depth", "dtype"),
    [
        (37, 96, torch.float16),
        (9, 131, torch.bfloat16),
        (5, 1, torch.float16),
        (3, 1100, torch.bfloat16),
        (6, 2048, torch.bfloat16),
        (5, 3000, torch.float32),
    ],
)
def test_sizes(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    impl = rms_norm_linear.impls["triton_gemv"]
    x, weight = randn(rows, depth, dtype=dtype) + 1, _tensor(columns, depth, seed=1, dtype=dtype)
    scale, bias = 1 + _tensor(depth, seed=7, dtype=dtype), _tensor(columns, seed=2, dtype=dtype)
    args = (x, scale, 1e-5, weight, bias, "gelu")
    assert impl.why_not(*args) == ["the inputs are on cpu, not on a CUDA device"]
    _assert_right(*args)
    assert torch.equal(impl.fn(*args), gemv(x, weight, bias, "gelu", norm=Norm(scale, 1e-5)))


def test_every_config() -> None:
    """Whole blocks of K and not, which are loaded otherwise."""
    for depth in (2048, 1100):
        x, weight, scale = randn(2, depth), _tensor(7, depth, seed=1, dtype=torch.float32), randn(depth, seed=2)
        args = (x, scale, 1e-5, weight, None, "silu")
        eager, truth = rms_norm_linear.reference(*args), oracle(rms_norm_linear.reference, *args)
        for config in gemv_configs(Product.of(x, weight)):
            assert_close(gemv(x, weight, None, "silu", norm=Norm(scale, 1e-5), config=config), eager, truth)


def test_the_normalized_x_is_not_rounded() -> None:
    """Differences of pairs that are nearly alike would show it. In float16: the interpreter cuts bfloat16 off."""
    dtype = torch.float16
    x = randn(4, 32).repeat_interleave(2, dim=1)
    x[:, 1::2] *= 1 + 1 / 64
    weight = torch.eye(64)[::2] - torch.eye(64)[1::2]
    x, weight, scale = x.to(dtype), weight.to(dtype), 1 + _tensor(64, seed=7, dtype=dtype)
    wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * scale.double()
    exact = (wide @ weight.double().t()).to(dtype)
    result, separate = gemv(x, weight, norm=Norm(scale, 1e-5)), rms_norm_linear.reference(x, scale, 1e-5, weight)
    # Sums in float32 may round at a tie the other way.
    assert (result != exact).sum() <= 2
    assert (separate != exact).sum() > exact.numel() // 2


@pytest.mark.parametrize("factor", [3e4, 5e-5])
def test_squares_that_float16_does_not_hold(factor: float) -> None:
    x = (randn(3, 300).clamp(-2, 2) * factor).half()
    assert not (x * x).isfinite().all() or not (x * x).any()
    _assert_right(x, 1 + _tensor(300, seed=1), 1e-12, _tensor(20, 300, seed=2))


def test_eps_counts_where_x_is_small() -> None:
    _assert_right(randn(3, 100) * 1e-3, None, 1e-5, _tensor(20, 100, seed=2, dtype=torch.float32))


def test_strided_inputs_are_read_in_place() -> None:
    packed, weight = randn(2, 3, 3 * 64, dtype=torch.float16), _tensor(40, 128, seed=1)[:, 64:]
    bias, scale = _tensor(80, seed=2)[::2], (1 + _tensor(128, seed=7))[::2]
    for x in (packed[..., 64:128], packed[:, :, ::3], packed.transpose(0, 1)[..., :64]):
        _assert_right(x, scale, 1e-5, weight, bias, "silu")


@pytest.mark.parametrize("scale", [None, torch.float32, torch.bfloat16], ids=str)
def test_norms_of_other_dtypes_and_without_weight(scale: torch.dtype | None) -> None:
    x, weight = randn(3, 100, dtype=torch.float16) + 1, _tensor(40, 100, seed=1)
    _assert_right(x, None if scale is None else 1 + _tensor(100, seed=7, dtype=scale), 1e-5, weight)


@pytest.mark.parametrize(("depth", "rows"), [(104, 6), (1024, 1)])
def test_gates(depth: int, rows: int) -> None:
    x, weight, bias = randn(rows, depth, dtype=torch.float16) + 2, _tensor(14, depth, seed=1), _tensor(14, seed=2)
    scale = 1 + _tensor(depth, seed=3)

    def reference(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gate, up = rms_norm_linear.reference(x, scale, 1e-5, weight, bias).chunk(2, dim=-1)
        return activate(gate, "silu") * up

    result = gemv(x, weight, bias, "silu", gated=True, norm=Norm(scale, 1e-5))
    args = (x, scale, weight, bias)
    assert_close(result, reference(*args), oracle(reference, *args))


def test_a_gated_mlp() -> None:
    x, scale = randn(1, 2, 96, dtype=torch.float16) * 3, 1 + _tensor(96, seed=1)
    args = (x, scale, 1e-5, _tensor(80, 96, seed=2), _tensor(24, 40, seed=3), None, _tensor(24, seed=4), "gelu_tanh")
    impl = rms_norm_gated_mlp.impls["triton_gemv"]
    assert impl.why_not(*args) == ["the inputs are on cpu, not on a CUDA device"]
    eager, truth = rms_norm_gated_mlp.reference(*args), oracle(rms_norm_gated_mlp.reference, *args)
    for config in impl.configs(*args):  # type: ignore[misc]
        assert_close(impl.fn(*args, config=config), eager, truth)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_nan_or_infinity_spoils_no_other(bad: float) -> None:
    x, weight = randn(3, 64, dtype=torch.float16), _tensor(20, 64, seed=1)
    x[1, 5] = bad
    result = gemv(x, weight, norm=Norm(_tensor(64, seed=2), 1e-5))
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_without_a_norm_nothing_of_it_is_compiled() -> None:
    x, weight = randn(4, 64, dtype=torch.float16), _tensor(20, 64, seed=1)
    launches: list[Launch] = []
    with recording(launches.append, Target((9, 0), 132)):
        gemv(x, weight)
        gemv(x, weight, norm=Norm(None, 1e-5))
    plain, normed = launches
    assert (plain.args[-3:], plain.constants["NORMED"]) == ((None, 1, None), False)
    assert (normed.args[-3:], normed.constants["NORMED"]) == ((None, 1, 1e-5), True)


def test_reasons() -> None:
    scale, weight = _tensor(32, seed=1), _tensor(20, 32, seed=2)
    why_not = partial(rms_norm_linear.impls["triton_gemv"].why_not, eps=1e-5, weight=weight)
    assert why_not(_tensor(9, 32, seed=0), scale)[1:] == ["x has 9 rows; the kernel takes up to 8"]
    assert why_not(_tensor(4, 32, seed=0), scale.double())[1:] == [
        "norm_weight is torch.float64; the kernel takes float16, bfloat16 and float32"
    ]
    k_major, down = _tensor(32, 20, seed=3).t(), _tensor(5, 10, seed=4)
    reasons = rms_norm_gated_mlp.impls["triton_gemv"].why_not(scale[None], None, 1e-5, k_major, down)
    assert "contiguous along K" in reasons[-1]


@pytest.mark.slow
def test_at_models_sizes_nothing_spills_and_the_weight_stays_where_it_was_loaded() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot_normed"]
    run = subprocess.run(command, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    compiled = json.loads(run.stdout)
    assert len(compiled) > 50
    assert not [entry for entry in compiled if "error" in entry or entry["spills"] or entry["moved"]]
