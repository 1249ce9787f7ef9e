"""The product of up to 32 rows that rotates and appends, interpreted: sizes, configs, strides, what is dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.ops import linear_rope_append
from tests.kernels.test_gemv_append import BF16, FP16, H200, check, inputs
from tests.slow import slow

pytest.importorskip("triton")

from burnish.kernels.launch import Config, Launch, recording
from burnish.kernels.skinny_append import skinny_append, skinny_append_configs


def check_skinny(*args: Any, config: Config | None = None) -> None:
    check(*args, config=config, name="triton_skinny")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "heads", "d", "depth", "batch", "s", "dtype"),
    [
        (3, 1, 8, 40, 12, 1, BF16),
        (5, 2, 6, 131, 5, 4, FP16),
        slow(1, 1, 2, 1, 2, 1, FP16),
        slow(2, 2, 20, 64, 1, 32, BF16),
    ],
)
def test_sizes(
    q_heads: int, heads: int, d: int, depth: int, batch: int, s: int, dtype: torch.dtype, interleaved: bool
) -> None:
    """Programs that end within a head, and with the last one; whole blocks of K and not."""
    args = inputs(q_heads, heads, d, batch=batch, s=s, depth=depth, dtype=dtype)
    check_skinny(*args, torch.arange(batch) % 7, interleaved)


@pytest.mark.parametrize("depth", [512, slow(520)])
def test_every_config(depth: int) -> None:
    args = inputs(7, 2, 10, batch=9, depth=depth, dtype=FP16)
    small = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)
    for config in dict.fromkeys((*skinny_append_configs(*args[:2]), small)):
        check_skinny(*args, torch.tensor([4, 2, 6, 0, 5, 1, 1, 3, 2]), config=config)


@pytest.mark.parametrize("s", [1, 4])
def test_without_tables(s: int) -> None:
    args = inputs(5, 1, 6, batch=5, s=s, dtype=BF16, tables=None)
    check_skinny(*args, torch.arange(5))
    check_skinny(*args[:2], None, *args[3:], torch.tensor(3))


@pytest.mark.parametrize("lengths", [0, 5, 6, 1 << 40])
def test_what_does_not_fit_is_dropped(lengths: int) -> None:
    check_skinny(*inputs(s=4, dtype=BF16), torch.tensor([lengths, 3]))


def test_strided_inputs_are_read_in_place() -> None:
    x, weight, bias, *rest = inputs(batch=2, s=3, depth=64, dtype=FP16)
    packed, weight = torch.cat((x, x, x), dim=2), torch.cat((weight, weight), dim=1)[:, 32:96]
    for given in (packed[..., 64:128], packed[:, :, ::3], x.transpose(0, 1).contiguous().transpose(0, 1)):
        check_skinny(given, weight, bias.repeat_interleave(2)[::2], *rest, torch.tensor(2))


def test_all_is_one_launch_of_whole_pairs() -> None:
    args = inputs(32, 8, 128, batch=16, depth=4096, dtype=BF16)
    launches: list[Launch] = []
    with recording(launches.append, H200):
        skinny_append(*args, torch.tensor(4))
    (only,) = launches
    assert only.grid == (96,)
    assert (only.constants["BLOCK_M"], only.constants["EVEN_K"], only.constants["INTERLEAVED"]) == (16, True, False)
    args[3:5] = None, None
    with recording(launches.append, H200):
        skinny_append(*args, torch.tensor(4))
    assert launches[1].constants["INTERLEAVED"], "neighbours, so that a tile's rows follow each other"
    with recording(launches.append, H200):
        configs = skinny_append_configs(*args[:2])
    assert {config["BLOCK_N"] for config in configs} == {32, 64}


def test_reasons() -> None:
    def reasons(batch: int) -> list[str]:
        args = linear_rope_append.bind(*inputs(batch=batch, dtype=BF16), torch.tensor(0))
        found = linear_rope_append.impls["triton_skinny"].why_not(*args)
        return [reason for reason in found if "CUDA" not in reason]

    assert reasons(1) == ["x has 1 rows; the kernel takes 2 to 64"]
    assert reasons(2) == reasons(32) == []
    assert reasons(33) == ["x has 33 rows; the kernel takes up to 32"]
