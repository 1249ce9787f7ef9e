"""Packed sequences: the same as one at a time, by every Impl and in both passes; bad input is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import burnish
from burnish.numerics import assert_close, oracle, randn
from burnish.op import ImplUnavailable
from burnish.ops import attention, varlen_attention


def offsets(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def qkv(tokens: int, keys: int | None = None, dtype: torch.dtype = torch.float32, d: int = 16) -> tuple[Tensor, ...]:
    keys = tokens if keys is None else keys
    return tuple(
        randn(n, h, d, dtype=dtype, seed=seed) for seed, (n, h) in enumerate(((tokens, 4), (keys, 2), (keys, 2)))
    )


@pytest.mark.parametrize("impl", ["torch_flash", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [(5, 33, 0, 1, 17), (2, 1, 3, 0, 2, 1), (0, 0, 4), (64,)],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_as_one_sequence_at_a_time(
    lengths: tuple[int, ...], is_causal: bool, dtype: torch.dtype, impl: str
) -> None:
    q, k, v = qkv(sum(lengths), dtype=dtype)
    with burnish.use(varlen_attention=impl):
        out = varlen_attention(q, k, v, offsets(*lengths), is_causal=is_causal)
    for part, *one in zip(*(t.split(lengths) for t in (out, q, k, v)), strict=True):
        if len(part):
            args = (*(t.transpose(0, 1)[None] for t in one), None, None, is_causal)
            assert_close(part.transpose(0, 1)[None], attention.reference(*args), oracle(attention.reference, *args))


def test_no_token_of_another_sequence_is_seen() -> None:
    lengths = 5, 9, 3
    q, k, v = qkv(17)
    out = varlen_attention(q, k, v, offsets(*lengths))
    k, v = k.clone(), v.clone()
    k[:5], v[:5], k[14:], v[14:] = (torch.nan,) * 4
    again = varlen_attention(q, k, v, offsets(*lengths))
    assert torch.equal(out[5:14], again[5:14])


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_what_wants_them_and_the_same_bits(needs: tuple[bool, ...]) -> None:
    def gradients() -> list[Any]:
        leaves = [t.requires_grad_(need) for t, need in zip(qkv(17), needs, strict=True)]
        varlen_attention(*leaves, offsets(5, 9, 3), is_causal=True).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    first, second = gradients(), gradients()
    for need, one, other in zip(needs, first, second, strict=True):
        assert (one is not None) == need
        assert one is None or torch.equal(one, other)


def test_the_backward_pass_takes_the_impl_that_was_chosen() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(17, d=16))
    wide = torch.cat([v, v], dim=2)
    with (
        burnish.use(varlen_attention="torch_flash"),
        pytest.raises(ImplUnavailable, match="v's head_dim is 32 where q's is 16"),
    ):
        varlen_attention(q, k, wide, offsets(17))
    with burnish.use(varlen_attention="reference"):
        out = varlen_attention(q, k, v, offsets(17))
    out.sum().backward()
    assert q.grad is not None


WRONG = {
    "q has dtype torch.int64; it must be a floating-point tensor": lambda a: (a[0].long(), *a[1:]),
    "k has dtype torch.float64 where q has torch.float32": lambda a: (a[0], a[1].double(), *a[2:]),
    "q has shape (17, 64); it must be (tokens, heads, head_dim)": lambda a: (a[0].flatten(1), *a[1:]),
    "k has shape (17, 3, 16); for q of": lambda a: (a[0], torch.zeros(17, 3, 16), torch.zeros(17, 3, 16), a[3]),
    "v has shape (16, 2, 16); it must be k's": lambda a: (a[0], a[1], a[2][1:], a[3]),
    "cu_seqlens_k is needed": lambda a: (a[0], a[1][1:], a[2][1:], a[3]),
    "cu_seqlens_q has dtype torch.float32": lambda a: (*a[:3], a[3].float()),
    "cu_seqlens_q has shape (1, 4)": lambda a: (*a[:3], a[3][None]),
    "cu_seqlens_q is [0, 5, 14, 17]; it must rise from 0 to the number of tokens, 16": lambda a: (
        *(t[1:] for t in a[:3]),
        a[3],
    ),
    "cu_seqlens_q is [0, 9, 5, 17]": lambda a: (*a[:3], torch.tensor([0, 9, 5, 17])),
    "cu_seqlens_k has shape (3,) where cu_seqlens_q has (4,)": lambda a: (*a, torch.tensor([0, 5, 17])),
    "max_seqlen_q is 8; there are 9": lambda a: (*a, None, 8),
    "max_seqlen_q is -1": lambda a: (*a, None, -1),
    "window is 0": lambda a: (*a, None, None, None, False, 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message: str) -> None:
    args = WRONG[message]((*qkv(17), offsets(5, 9, 3)))  # type: ignore[no-untyped-call]
    with pytest.raises((ValueError, TypeError)) as error:
        varlen_attention(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
