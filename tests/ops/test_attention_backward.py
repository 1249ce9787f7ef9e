"""Attention in training: gradients, dropout that a seed replays, and the same Impl in both passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import burnish
from burnish.numerics import assert_close, oracle, randn
from burnish.op import ImplUnavailable
from burnish.ops import _attention_cuda, attention, attention_backward, attention_with_logsumexp, draw_seed
from burnish.ops import _attention_training as training
from burnish.ops._dropout import kept_weights
from tests.ops.matrix import DTYPES, assert_impls
from tests.ops.test_attention import CASES, padding, qkv
from tests.slow import slow

SEED = torch.tensor([12345678901])


def passes(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> None:
    """Every Impl of both passes, and the gradients of the Op against those of its reference."""
    forward = attention_with_logsumexp.bind(q, k, v, **kwargs)
    assert_impls(attention_with_logsumexp, *forward)
    out, logsumexp = attention_with_logsumexp.reference(*forward)
    grad = randn(*out.shape, dtype=q.dtype, seed=9)
    bias = kwargs.get("bias")
    assert_impls(
        attention_backward, grad, q, k, v, out, logsumexp, *forward[3:], bias is not None and bias.dtype != torch.bool
    )


def gradients(fn: Any, *args: Any) -> list[Tensor]:
    tracked = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = fn(*tracked)
    wanted = [a for a in tracked if isinstance(a, Tensor) and a.requires_grad]
    return list(torch.autograd.grad(out, wanted, randn(*out.shape, seed=9).to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 33), slow(1, 257)])
def test_masks_and_lengths(b: int, s: int, case: str, dtype: torch.dtype) -> None:
    passes(*qkv(b, lq=s, lk=s, d=16, dtype=dtype), **CASES[case](b, s, dtype))


@pytest.mark.parametrize(("lq", "lk"), [(1, 130), (7, 130), (33, 7)])
@pytest.mark.parametrize("kwargs", [{"is_causal": True}, {"is_causal": True, "window": 5}, {"key_padding_mask": True}])
def test_other_numbers_of_queries_than_keys(lq: int, lk: int, kwargs: dict[str, Any]) -> None:
    kwargs = {name: padding(2, lk) if name == "key_padding_mask" else value for name, value in kwargs.items()}
    passes(*qkv(2, 4, 2, lq, lk, 16), **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"key_padding_mask": padding(2, 17)}, {"bias": True}])
@pytest.mark.parametrize(("hq", "hkv"), [(8, 2), (4, 1)])
def test_grouped_heads(hq: int, hkv: int, kwargs: dict[str, Any]) -> None:
    kwargs = {n: randn(2, hq, 17, 17, seed=5) if n == "bias" else value for n, value in kwargs.items()}
    passes(*qkv(2, hq, hkv, 17, 17, 16), **kwargs)


def test_gradients_are_pytorchs() -> None:
    q, k, v = qkv()
    for kwargs in ({}, {"is_causal": True}):
        theirs = lambda q, k, v, kwargs=kwargs: F.scaled_dot_product_attention(q, k, v, **kwargs)  # noqa: E731
        ours = lambda q, k, v, kwargs=kwargs: attention(q, k, v, **kwargs)  # noqa: E731
        truth = gradients(theirs, *(t.double() for t in (q, k, v)))
        assert_close(gradients(ours, q, k, v), gradients(theirs, q, k, v), truth)


def test_a_gradient_that_is_expanded() -> None:
    q, k, v = qkv()
    tracked = [t.detach().requires_grad_() for t in (q, k, v)]
    found = torch.autograd.grad(attention(*tracked, is_causal=True).sum(), tracked)
    eager = torch.autograd.grad(attention.reference(*tracked, is_causal=True).sum(), tracked)
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    assert_close(found, eager, torch.autograd.grad(attention.reference(*double, is_causal=True).sum(), double))


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (3,)])
def test_only_the_gradients_that_are_wanted(needs: tuple[int, ...]) -> None:
    args = [*qkv(), randn(1, 2, 1, 33, seed=5)]
    for place in needs:
        args[place] = args[place].detach().requires_grad_()
    attention(*args).square().sum().backward()
    assert [i for i, a in enumerate(args) if a.grad is not None] == list(needs)
    every = gradients(lambda *a: attention(*a), *args)
    assert len(every) == 4


def test_the_same_bits_at_every_run() -> None:
    for kwargs in ({}, {"dropout_p": 0.3, "seed": SEED, "is_causal": True}):
        first, again = (gradients(lambda *a, kwargs=kwargs: attention(*a, **kwargs), *qkv(2, 4, 2)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_without_keys_have_no_gradient() -> None:
    q, k, v = qkv(lq=9, lk=5)
    dq, dk, dv = gradients(lambda *a: attention(*a, is_causal=True), q, k, v)
    assert dq[:, :, :4].abs().max() == 0
    assert all(t.isfinite().all() for t in (dq, dk, dv))
    _, logsumexp = attention_with_logsumexp(q, k, v, is_causal=True)
    assert (logsumexp[:, :, :4] == torch.inf).all()
    assert logsumexp[:, :, 4:].isfinite().all()


# --- the same Impl in both passes ---


@pytest.mark.parametrize("name", ["torch_flash", "reference"])
def test_one_choice_holds_for_both_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for op in (attention_with_logsumexp, attention_backward):
        for impl in op.impls.values():

            def noted(*args: Any, op: Any = op, impl: Any = impl, fn: Any = impl.fn, **kwargs: Any) -> Any:
                ran.append((op.name, impl.name))
                return fn(*args, **kwargs)

            monkeypatch.setitem(op.impls, impl.name, type(impl)(**{**vars(impl), "fn": noted}))
    q, k, v = (t.requires_grad_() for t in qkv())
    with burnish.use(attention=name):
        out = attention(q, k, v, key_padding_mask=padding(2, 33))
    out.sum().backward()  # outside: what was chosen still holds
    assert ran == ([] if name == "reference" else [("attention_with_logsumexp", name), ("attention_backward", name)])


@pytest.mark.parametrize("name", ["torch_cudnn", "triton", "torch_efficient", "gluon"])
def test_a_choice_that_cannot_be_raises_with_every_reason(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    with burnish.use(attention=name), pytest.raises(ImplUnavailable, match="the inputs are on cpu"):
        attention(q, k, v)


def test_on_a_gpu_the_quickest_that_repeat_their_bits_come_first() -> None:
    forward, backward = (
        [name for name, impl in op.impls.items() if name != "torch_flash_float32" and not impl.named_only]
        for op in (attention_with_logsumexp, attention_backward)
    )
    assert forward[:2] == ["torch_cudnn", "torch_flash"]
    assert backward[:2] == ["triton", "torch_flash"]
    assert attention_backward.impls["torch_cudnn"].named_only


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_torch_kernels_are_called_as_they_are_declared(name: str) -> None:
    heads = 2 if name == "efficient" else 4
    q, k, v = (t.to("meta") for t in qkv(2, heads, heads, 9, 9, 32, torch.float16))
    bound = attention.bind(q, k, v, is_causal=True, scale=0.5)
    out, logsumexp = getattr(training, f"{name}_forward")(*bound)
    assert (out.shape, logsumexp.shape, logsumexp.dtype) == (q.shape, q.shape[:3], torch.float32)
    if name == "efficient":
        return  # PyTorch's own function for empty results takes other arguments than its operator
    results = getattr(training, f"{name}_backward")(out, q, k, v, out, logsumexp, *bound[3:])
    assert [t.shape for t in results] == [q.shape, k.shape, v.shape, (0,)]
    assert all(t.transpose(1, 2).is_contiguous() for t in results[:3])
    assert not torch.are_deterministic_algorithms_enabled()


# --- dropout ---


def test_dropout_is_checked() -> None:
    q, k, v = qkv()
    for dropout_p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout_p is {dropout_p}; it must be at least 0 and less than 1"):
            attention(q, k, v, dropout_p=dropout_p, seed=SEED)
    with pytest.raises(ValueError, match=r"seed is None where dropout_p is 0\.1"):
        attention(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"seed is torch\.float32 of shape"):
        attention(q, k, v, dropout_p=0.1, seed=torch.ones(1))
    for name in ("torch_flash", "torch_sdpa"):
        (reason,) = attention.impls[name].why_not(q, k, v, dropout_p=0.1, seed=SEED)
        assert "cannot drop the weights that the seed says" in reason
    assert "dropout_p is 0.1" in "; ".join(_attention_cuda.cudnn_why_not(*attention.bind(q, k, v, dropout_p=0.1)))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_statistics_of_dropout(dropout_p: float) -> None:
    kept = kept_weights(SEED, dropout_p, 2, 3, 200, 333).float()
    count = kept.numel()
    spread = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert abs(kept.mean() - (1 - dropout_p)) < 4 * spread
    for dim in range(4):  # no entry of any dimension stands out
        means = kept.movedim(dim, 0).flatten(1).mean(1)
        assert (means - (1 - dropout_p)).abs().max() < 5 * spread * kept.shape[dim] ** 0.5
    centered = kept - kept.mean()
    for dim in (2, 3):  # neighbours do not know of each other
        pairs = (centered * centered.roll(1, dim)).mean() / centered.square().mean()
        assert abs(pairs) < 5 / count**0.5
    other = kept_weights(SEED + 1, dropout_p, 2, 3, 200, 333).float() - kept.mean()
    assert abs((centered * other).mean() / centered.square().mean()) < 5 / count**0.5


def test_what_is_dropped_depends_on_the_place_alone() -> None:
    large = kept_weights(SEED, 0.4, 2, 4, 50, 90)
    small = kept_weights(SEED, 0.4, 1, 4, 20, 37)
    assert torch.equal(small[0], large[0, :, :20, :37])


def test_dropout_keeps_the_mean_and_its_gradient_is_the_references() -> None:
    q, k, v = qkv(2, 2, 2, 9, 40, 16)
    plain = attention(q, k, v)
    draws = torch.stack([attention(q, k, v, dropout_p=0.3, seed=torch.tensor([n])) for n in range(300)])
    assert (draws.mean(0) - plain).abs().mean() < 0.1 * draws.std(0).mean()
    for fn in (attention, attention.overload):
        found = gradients(lambda *a, fn=fn: fn(*a, None, None, True, None, None, 0.3, SEED), q, k, v)
        reference = lambda *a: attention.reference(*a, None, None, True, None, None, 0.3, SEED)  # noqa: E731
        assert_close(found, gradients(reference, q, k, v), gradients(reference, *(t.double() for t in (q, k, v))))


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, is_causal=True, dropout_p=0.5, seed=draw_seed(q.device))


def test_a_seed_is_replayed() -> None:
    torch.manual_seed(3)
    first, second = (gradients(dropping, *qkv()) for _ in range(2))
    torch.manual_seed(3)
    again = gradients(dropping, *qkv())
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)  # a checkpoint computes forward twice, and drops the same both times
    recomputed = gradients(lambda *a: checkpoint(dropping, *a, use_reentrant=False), *qkv())
    assert all(torch.equal(a, b) for a, b in zip(first, recomputed, strict=True))


def test_dropout_compiled() -> None:
    compiled = torch.compile(dropping, backend="aot_eager", fullgraph=True)
    q, k, v = qkv(lq=9, lk=9, d=16)
    torch.manual_seed(5)
    first, second = (gradients(compiled, q, k, v) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(gradients(compiled, q, k, v)[0], first[0])
    assert not torch.equal(first[0], second[0])


def test_the_oracle_drops_the_same() -> None:
    q, k, v = qkv()
    args = attention.bind(q, k, v, dropout_p=0.5, seed=SEED)
    assert_close(attention(*args), attention.reference(*args), oracle(attention.reference, *args))
