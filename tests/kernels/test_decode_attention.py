"""The attention over a cache, its keys split among programs, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import decode_attention
from burnish.kernels.launch import Config, Target
from burnish.numerics import assert_close, oracle, randn
from burnish.op import Sample
from burnish.ops import attention, cached_attention
from tests.slow import slow

CONFIGS = [Config.of(4, 2, BLOCK_N=n, SPLITS=splits) for n, splits in ((16, 1), (16, 3), (32, 8), (64, 5), (128, 16))]
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
@pytest.mark.parametrize("length", [0, 64, 200, *map(slow, (1, 2, 16, 63, 65, 190))])
def test_every_split_of_every_length(config: Config, length: int) -> None:
    q, k, v = randn(2, 4, 2, 32, seed=0), randn(2, 2, 200, 32, seed=1), randn(2, 2, 200, 32, seed=2)
    k[:, :, length:], v[:, :, length:] = torch.nan, torch.nan  # the kernel does not even read it
    bound = cached_attention.bind(q, k, v, torch.tensor(length))
    result = cached_attention.impls["triton"].fn(*bound, config=config)
    whole = cached_attention.bind(q, k.nan_to_num(), v.nan_to_num(), torch.tensor(length))
    assert_close(result, cached_attention.reference(*whole), oracle(cached_attention.reference, *whole))
    check(config, q, k.nan_to_num(), v.nan_to_num(), torch.tensor([length, 200 - length]), window=37)


# With 120 keys at most: a block for each program; several blocks; more programs than blocks.
@pytest.mark.parametrize(("block_n", "splits"), [(16, 8), (16, 3), (32, 16)])
@pytest.mark.parametrize(
    ("groups", "lq"), [(4, 1), (8, 5), *(slow(*rows) for rows in ((1, 1), (8, 1), (1, 2), (4, 3), (8, 4), (1, 5)))]
)
def test_rows_that_share_a_key_head(groups: int, lq: int, block_n: int, splits: int) -> None:
    q, k, v = randn(3, groups, lq, 32, seed=0), randn(3, 1, 120, 32, seed=1), randn(3, 1, 120, 32, seed=2)
    check(Config.of(4, 2, BLOCK_N=block_n, SPLITS=splits), q, k, v, torch.tensor([5, 40, 119]))


@pytest.mark.parametrize("length", [17, 300, *map(slow, (0, 16, 150))])
@pytest.mark.parametrize("chunk", [1, 4])
def test_parts_are_added_up_by_chunks(chunk: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "_chunk", lambda *_: chunk)
    q, k, v = randn(1, 4, 2, 32, seed=0), randn(1, 2, 300, 32, seed=1), randn(1, 2, 300, 32, seed=2)
    check(Config.of(4, 2, BLOCK_N=16, SPLITS=19), q, k, v, torch.tensor(length))


@pytest.mark.parametrize("guessed", [0, 1 << 22])
def test_what_is_not_filled_does_not_matter(guessed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a program reads its block before it knows the length."""
    monkeypatch.setattr(decode_attention, "_GUESSED", guessed)
    q, k, v = randn(1, 4, 1, 32, seed=0), randn(1, 2, 100, 32, seed=1), randn(1, 2, 100, 32, seed=2)
    config, length = Config.of(4, 2, BLOCK_N=16, SPLITS=7), torch.tensor(42)
    expected = check(config, q, k, v, length)
    k[:, :, 42:], v[:, :, 42:] = torch.nan, torch.inf
    assert torch.equal(cached_attention.impls["triton"].fn(*cached_attention.bind(q, k, v, length), config), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("length", [200, *map(slow, (1, 17, 64, 190))])
def test_a_bias_is_read_over_what_is_filled(config: Config, length: int) -> None:
    q, k, v = randn(2, 4, 2, 32, seed=0), randn(2, 2, 200, 32, seed=1), randn(2, 2, 200, 32, seed=2)
    lengths, bias = torch.tensor([length, 200 - length]), randn(200, 4, 2, seed=3).permute(1, 2, 0)
    check(config, q, k, v, lengths, bias=bias, window=150)
    check(config, q[:, :, 1:], k, v, lengths, bias=randn(2, 1, 1, 200, dtype=torch.bfloat16, seed=4))
    rest = bias[None].expand(2, 4, 2, 200).clone()
    expected = check(config, q, k, v, lengths, bias=rest)
    rest[0, :, :, length:], rest[1, :, :, 200 - length :] = torch.nan, torch.nan
    bound = cached_attention.bind(q, k, v, lengths, bias=rest)
    assert torch.equal(cached_attention.impls["triton"].fn(*bound, config=config), expected)


def test_a_bias_of_the_lowest_number_masks_as_the_reference_does() -> None:
    q, k, v = randn(1, 2, 1, 32, seed=0), randn(1, 2, 40, 32, seed=1), randn(1, 2, 40, 32, seed=2)
    lowest = torch.finfo(torch.float32).min
    for masked in (torch.arange(40) < 30, torch.arange(40) < 40):
        check(None, q, k, v, torch.tensor(37), bias=torch.where(masked, lowest, 0.0))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    q, k, v = randn(1, 2, 1, 32, seed=0), randn(1, 2, 40, 32, seed=1), randn(1, 2, 40, 32, seed=2)
    with pytest.raises(ValueError, match="bias has shape"):
        cached_attention(q, k, v, torch.tensor(3), bias=torch.zeros(39))
    with pytest.raises(TypeError, match="bias has dtype torch"):
        cached_attention(q, k, v, torch.tensor(3), bias=torch.zeros(40, dtype=torch.bool))


@pytest.mark.parametrize("config", [None, CONFIGS[0], *map(slow, CONFIGS[1:])], ids=str)
def test_one_query_over_keys_that_are_all_there(config: Config | None) -> None:
    impl = attention.impls["triton_decode"]
    ran = 0
    for sample in attention.samples("cpu", torch.float16):
        bound = attention.bind(*sample.args, **sample.kwargs)
        if all("not on a CUDA device" in reason for reason in impl.why_not(*bound)):
            result = impl.fn(*bound, config=config)
            assert_close(result, attention.reference(*bound), oracle(attention.reference, *bound))
            ran += 1
    assert ran >= 4


def test_parts_fit_in_registers() -> None:
    assert decode_attention._chunk(20, 4 * 64 * 4, 4) == 32  # all of Llama-1B's at once
    assert decode_attention._chunk(32, 4 * 128 * 4, 4) == 32
    assert decode_attention._chunk(64, 4 * 128 * 4, 4) == 32
    assert decode_attention._chunk(64, 64 * 256 * 4, 4) == 1


def test_the_counters_are_left_as_they_were() -> None:
    q, k, v = randn(1, 4, 1, 32, seed=0), randn(1, 2, 300, 32, seed=1), randn(1, 2, 300, 32, seed=2)
    config = Config.of(4, 2, BLOCK_N=16, SPLITS=7)
    results = [check(config, q, k, v, torch.tensor(290)) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_configs_fill_the_device() -> None:
    h200 = Target((9, 0), 132)
    for pairs, most in ((8, 1024), (8, 8192), (256, 4096), (1, 100)):
        configs = decode_attention._configs(pairs, most, 128, torch.bfloat16, h200)
        assert len(configs) <= 9
        for config in configs:
            programs = pairs * config["SPLITS"]
            assert programs <= max(4 * h200.num_sms, 8 * pairs)
            assert config["SPLITS"] == 1 or (config["SPLITS"] - 1) * config["BLOCK_N"] < most
    one = decode_attention._configs(8, 1280, 64, torch.bfloat16, h200)[0]
    assert one["SPLITS"] * one["BLOCK_N"] == 1280  # a block for each program, more of those than multiprocessors
    assert decode_attention._configs(256, 4096, 128, torch.bfloat16, h200)[0]["SPLITS"] == 1
