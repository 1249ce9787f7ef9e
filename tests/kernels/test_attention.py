"""The attention kernel in Triton's interpreter: lengths, head dimensions, masks, strides, and rows without a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.numerics import assert_close, oracle, randn
from burnish.ops import _attention_cuda, attention

pytest.importorskip("triton")

from burnish.kernels.attention_configs import configs_for
from burnish.kernels.launch import Config, Target, recording
from tests.slow import slow

TMA = Config.of(4, 2, BLOCK_M=64, BLOCK_N=64, TMA=1)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def qkv(
    b: int = 1,
    hq: int = 2,
    hkv: int = 2,
    lq: int = 33,
    lk: int = 33,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (b, lq, hq, d), (b, lk, hkv, d), (b, lk, hkv, d)
    q, k, v = (randn(*shape, dtype=dtype, seed=i).transpose(1, 2) for i, shape in enumerate(shapes))
    return q, k, v


def check(*args: Any, config: Config | None = None, **kwargs: Any) -> Tensor:
    """The kernel's result, once it is found right: numbers, layout in memory, inputs left alone."""
    bound = attention.bind(*args, **kwargs)
    reasons = attention.impls["triton"].why_not(*bound)
    assert all("not on a CUDA device" in reason for reason in reasons), reasons
    versions = [a._version for a in bound if isinstance(a, Tensor)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors start as NaN
    try:
        result: Tensor = attention.impls["triton"].fn(*bound, config=config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(result, attention.reference(*bound), oracle(attention.reference, *bound))
    assert result.transpose(1, 2).is_contiguous()
    assert versions == [a._version for a in bound if isinstance(a, Tensor)]
    return result


def padding(b: int, lk: int) -> Tensor:
    lengths = torch.linspace(max(1, lk // 3), lk, b).long()
    return torch.arange(lk) < lengths[:, None]


@pytest.mark.parametrize("s", [1, 8, 16, 33, 64, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(s: int, is_causal: bool) -> None:
    check(*qkv(lq=s, lk=s), is_causal=is_causal)
    check(*qkv(2, lq=s, lk=s, dtype=torch.bfloat16), None, padding(2, s), is_causal)


@pytest.mark.parametrize("d", [16, 20, 32, 64, 80, 96, 128, 256])
def test_head_dims(d: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(*qkv(lq=9, lk=40, d=d, dtype=dtype))


PARTS = [
    Config.of(4, 2, BLOCK_M=32, BLOCK_N=32, TMA=0, PARTS=2),
    Config.of(4, 2, BLOCK_M=64, BLOCK_N=32, TMA=1, PARTS=2),
]


@pytest.mark.parametrize("config", [*PARTS, None], ids=str)
@pytest.mark.parametrize("d", [320, 512])
def test_wide_heads(d: int, config: Config | None) -> None:
    q, k, v = qkv(1, 2, 1, 21, 37, d, torch.bfloat16)
    check(q, k, v, config=config)
    check(q, k, v, randn(21, 37, seed=4) > 0, padding(1, 37), True, config=config)
    if config is None:
        check(q, k, v[..., :24])  # a single part, where v is not wide
        check(q[..., :16], k[..., :16], v)


def test_wide_heads_of_float32_are_refused() -> None:
    q, k, v = qkv(d=320, dtype=torch.float32)
    reasons = attention.impls["triton"].why_not(*attention.bind(q, k, v))
    assert [reason for reason in reasons if "head_dim 320 is above 256" in reason] == reasons[-2:]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("lq", "lk"), [(96, 64), slow(70, 70), slow(33, 128)])  # whole blocks, and parts of them
def test_boolean_biases(lq: int, lk: int, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, 1, lq, lk, 16)
    for shape, tma in (((lq, lk), 0), ((lq, lk), 1), ((2, lq, lk), 0), ((2, 1, lq, lk), 1), ((lq, 1), 0)):
        config = Config.of(4, 2, BLOCK_M=64, BLOCK_N=32, TMA=tma)
        check(q, k, v, randn(*shape, seed=5) > 0, is_causal=is_causal, config=config)
    check(q, k, v, (randn(lk, lq, seed=5) > 0).t(), is_causal=is_causal)


@pytest.mark.parametrize("lq", [64, 100, 150])
def test_every_block_of_queries_is_computed_once_in_any_order(lq: int) -> None:
    config = Config.of(4, 2, BLOCK_M=32, BLOCK_N=32, TMA=0)
    for batch in (1, 3):  # few programs at once, and more than that
        check(*qkv(batch, 2, 1, lq, lq, 16), is_causal=True, config=config)


@pytest.mark.parametrize("lk", [130, 257])
@pytest.mark.parametrize("lq", [1, 33])
def test_it_never_attends_beyond_the_last_key(lq: int, lk: int) -> None:
    check(*qkv(lq=lq, lk=lk))
    check(*qkv(lq=lq, lk=lk), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 2**40])
@pytest.mark.parametrize(("lq", "lk"), [(130, 130), (33, 200), (100, 40)])
def test_windows(lq: int, lk: int, window: int, is_causal: bool) -> None:
    config = Config.of(4, 2, BLOCK_M=32, BLOCK_N=32, TMA=0)  # whole blocks on either side, at an edge and within
    check(*qkv(lq=lq, lk=lk, d=16), is_causal=is_causal, window=window, config=config)


MASKS: dict[str, dict[str, Any]] = {
    "bias": {"bias": (2, 4, 40, 70)},
    "bias per head": {"bias": (4, 40, 70)},
    "bias per key": {"bias": (2, 1, 1, 70)},
    "bias per query": {"bias": (40, 1)},
    "one bias": {"bias": (1,)},
    "boolean": {"bias": (2, 1, 40, 70), "boolean": True},
    "boolean per key": {"bias": (70,), "boolean": True},
}


@HALF
@pytest.mark.parametrize("name", MASKS)
def test_a_bias_with_every_other_mask(name: str, dtype: torch.dtype) -> None:
    bias = randn(*MASKS[name]["bias"], seed=5)
    bias = bias > -0.5 if "boolean" in MASKS[name] else bias.to(dtype)
    q, k, v = qkv(2, 4, 2, 40, 70, 16, dtype)
    check(q, k, v, bias)
    check(q, k, v, bias, padding(2, 70).flip(1).int(), True, 30, 0.3)


def test_biases_of_other_dtypes() -> None:
    q, k, v = qkv(lq=9, lk=9)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check(q, k, v, randn(9, 9, seed=3).to(dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shown", [range(0), range(1), range(512), range(513), range(600), range(37, 600)], ids=str)
def test_padding_of_more_keys_than_are_looked_at_at_once(shown: range, is_causal: bool) -> None:
    mask = torch.zeros(2, 600, dtype=torch.int64)
    mask[0, list(shown)] = 1
    mask[1, [0, 3, 64, 511, 512, 590]] = 7
    for config in (None, TMA):
        check(*qkv(2, 1, 1, 33, 600, 64, torch.bfloat16), None, mask, is_causal, config=config)


@HALF
@pytest.mark.parametrize(("hq", "hkv"), [(8, 2), (4, 1), (6, 3)])
def test_grouped_heads(hq: int, hkv: int, dtype: torch.dtype) -> None:
    for lq in (1, 17):
        check(*qkv(2, hq, hkv, lq, 17, 16, dtype), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=str)
def test_strides_of_every_kind(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 4, 4, 17, 17, 16, dtype)
    check(*(t.contiguous() for t in (q, k, v)))
    check(*randn(2, 17, 4, 3, 16, dtype=dtype).permute(3, 0, 2, 1, 4).unbind(0))  # interleaved per head
    check(*randn(2, 17, 3, 4, 16, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0))  # packed one after the other
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    check(q.flip(2), k[:, :1].expand_as(k), v[:, :, :1].expand_as(v))
    check(q[..., ::2], k[..., ::2], v[..., ::2])
    bias = randn(2, 4, 17, 17, dtype=dtype)
    check(q, k, v, bias.transpose(2, 3))
    check(q, k, v, bias[:, :, :1].expand(2, 4, 17, 17))
    check(q, k, v, None, padding(17, 2).t())
    check(q, k, v, None, padding(2, 17)[:1].expand(2, 17), True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_that_may_attend_to_nothing_are_zeros(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, lq=40, lk=20, dtype=dtype)
    assert check(q, k, v, is_causal=True)[:, :, :20].abs().max() == 0
    assert check(q, k, v, None, torch.zeros(2, 20, dtype=torch.bool)).abs().max() == 0
    allowed = torch.ones(40, 20, dtype=torch.bool)
    allowed[7] = False
    for bias in (allowed, torch.zeros(40, 20).masked_fill(~allowed, -torch.inf)):
        assert check(q, k, v, bias)[:, :, 7].abs().max() == 0


def test_the_lowest_number_as_a_bias_is_no_mask() -> None:
    q, k, v = qkv(lq=9, lk=9, dtype=torch.float32)
    bias = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)
    bias[0] = torch.finfo(torch.float32).min  # all keys alike, as the reference has it
    assert check(q, k, v, bias)[:, :, 0].abs().max() > 0


@HALF
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_scales_and_large_scores(scale: float, dtype: torch.dtype) -> None:
    q, k, v = qkv(lq=20, lk=50, d=64, dtype=dtype)
    q, k = q / q.abs().max() * 120, k / k.abs().max() * 120  # the largest products are near 1e4
    check(q, k, v, scale=scale, is_causal=True)
    check(q, k, v, scale=scale, bias=torch.full((20, 50), 1e4).triu())


@HALF
def test_keys_by_descriptor(dtype: torch.dtype) -> None:
    check(*qkv(2, 4, 2, 70, 130, 32, dtype), config=TMA)
    check(*qkv(2, 2, 2, 70, 70, 80, dtype), None, padding(2, 70), True, config=TMA)


def test_configs_are_distinct_and_fit() -> None:
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        for d in (16, 32, 64, 80, 128, 256, 512):
            for length in (1, 16, 128, 4096):
                for dtype in (torch.float16, torch.float32) if d <= 256 else (torch.float16,):
                    q = torch.empty(1, length, 8, d, dtype=dtype, device="meta").transpose(1, 2)
                    with recording(lambda launch: None, Target(capability, 132)):
                        pairs = torch.empty(8, length, length, device="meta")
                        for bias in (None, pairs, pairs.bool()):
                            configs = configs_for(q, q, q, bias, None)
                            assert configs, (capability, d, length, dtype)
                            assert len({str(config) for config in configs}) == len(configs)


@pytest.mark.parametrize("name", ["torch_flash", "torch_cudnn", "torch_efficient"])
def test_torch_kernels_are_called_as_they_are_declared(name: str) -> None:
    q, k, v = (t.to("meta") for t in qkv(2, 4, 2, 9, 40, 32))
    for t in ((q, k, v), (q, k[:, :, :9], v[:, :, :9])):
        bound = attention.bind(*t, is_causal=True, scale=0.5)
        result = getattr(_attention_cuda, name)(*bound)
        assert result.shape == q.shape
        assert result.dtype == q.dtype
        assert result.transpose(1, 2).is_contiguous()
    if name == "torch_efficient":
        assert _attention_cuda.torch_efficient(q, k, v, q.new_empty(9, 1), None, True, 3).shape == q.shape


def test_reasons_against_torch_kernels_are_all_told() -> None:
    q, k, v = qkv(lq=9, lk=5, d=20)
    told = "; ".join(
        attention.impls["torch_cudnn"].why_not(q, k, v.transpose(2, 3).contiguous().mT, None, None, True, 3)
    )
    for reason in ("not on a CUDA device", "no window", "q's head_dim 20", "v's last dimension", "9 queries are not 5"):
        assert reason in told
    assert attention.impls["torch_efficient"].why_not(q, k, v, q.new_ones(9, 5).float())[-1].startswith("bias is")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mask_for_torch_kernels_is_safe(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, lq=9, lk=9, dtype=dtype)
    lowest = torch.zeros(9, 9, dtype=dtype)
    lowest[3, 1:] = torch.finfo(dtype).min
    lowest[4] = torch.finfo(dtype).min
    nothing = torch.ones(2, 9, dtype=torch.bool)
    nothing[0] = False
    for arguments in ((None, nothing, True, None), (lowest, None, False, 3), (lowest > 1, nothing, False, None)):
        mask, empty = _attention_cuda.safe_mask(q, k, *arguments)
        assert mask is not None
        assert empty is not None
        aligned = _attention_cuda._aligned(mask, 9)
        assert torch.equal(aligned, mask.expand_as(aligned))
        assert aligned.stride(2) % 8 == 0
        assert not (mask == -torch.inf).all(-1).any()

        def through(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask, empty: Tensor = empty) -> Tensor:
            return attention.reference(q, k, v, mask).masked_fill(empty, 0.0)

        assert_close(through(q, k, v), attention.reference(q, k, v, *arguments), oracle(through, q, k, v))
