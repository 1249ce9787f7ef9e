"""The attention over a cache, its keys split among programs, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels.decode_attention import _configs
from burnish.kernels.launch import Config, Target
from burnish.numerics import assert_close, oracle, randn
from burnish.op import Sample
from burnish.ops import cached_attention

CONFIGS = [Config.of(4, 2, BLOCK_N=n, SPLITS=splits) for n, splits in ((16, 1), (16, 3), (32, 8), (64, 5), (128, 64))]
SAMPLES = [
    pytest.param(sample, id=f"{str(dtype)[6:]} {sample.label}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for sample in cached_attention.samples("cpu", dtype)
]


def check(config: Config | None, *args: Any, **kwargs: Any) -> Tensor:
    bound = cached_attention.bind(*args, **kwargs)
    reasons = cached_attention.impls["triton"].why_not(*bound)
    assert all("not on a CUDA device" in reason for reason in reasons), reasons
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result: Tensor = cached_attention.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, cached_attention.reference(*bound), oracle(cached_attention.reference, *bound))
    assert result.transpose(1, 2).is_contiguous()
    return result


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples(sample: Sample) -> None:
    check(None, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 16, 63, 64, 65, 190, 200])
def test_every_split_of_every_length(config: Config, length: int) -> None:
    q, k, v = randn(2, 4, 2, 32, seed=0), randn(2, 2, 200, 32, seed=1), randn(2, 2, 200, 32, seed=2)
    k[:, :, length:], v[:, :, length:] = torch.nan, torch.nan  # the kernel does not even read it
    bound = cached_attention.bind(q, k, v, torch.tensor(length))
    result = cached_attention.impls["triton"].fn(*bound, config=config)
    whole = cached_attention.bind(q, k.nan_to_num(), v.nan_to_num(), torch.tensor(length))
    assert_close(result, cached_attention.reference(*whole), oracle(cached_attention.reference, *whole))
    check(config, q, k.nan_to_num(), v.nan_to_num(), torch.tensor([length, 200 - length]), window=37)


def test_the_counters_are_left_as_they_were() -> None:
    q, k, v = randn(1, 4, 1, 32, seed=0), randn(1, 2, 300, 32, seed=1), randn(1, 2, 300, 32, seed=2)
    config = Config.of(4, 2, BLOCK_N=16, SPLITS=7)
    results = [check(config, q, k, v, torch.tensor(290)) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_configs_fill_the_device() -> None:
    h200 = Target((9, 0), 132)
    for pairs, most in ((8, 1024), (8, 8192), (256, 4096), (1, 100)):
        for config in _configs(pairs, most, 128, torch.bfloat16, h200):
            programs = pairs * config["SPLITS"]
            assert programs <= max(4 * h200.num_sms, pairs)
            assert config["SPLITS"] == 1 or (config["SPLITS"] - 1) * config["BLOCK_N"] < most
