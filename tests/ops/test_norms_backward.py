"""Gradients of the norms, of embeddings and rope, and of what is composed of them: right, only those that are wanted,
the same bits each time, and with little kept for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import burnish
from burnish.numerics import assert_close, randn
from burnish.op import OPS, Op
from burnish.ops import (
    add_layer_norm,
    add_rms_norm,
    embedding,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_rope,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_qk,
)
from tests.ops.matrix import DTYPES, assert_impls, tensors

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NORMS = pytest.mark.parametrize("op", [layer_norm, rms_norm, add_layer_norm, add_rms_norm], ids=lambda op: op.name)


def gradients(
    fn: Callable[..., Any], args: Sequence[Any], wanted: Sequence[bool] | None = None, results: Sequence[bool] = ()
) -> list[Tensor | None]:
    """Of random weights times the results, or those of them that `results` says; for each argument that is wanted."""
    leaves = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted is None or wanted[i])
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for i, a in enumerate(args)
    ]
    found = tensors(fn(*leaves))
    used = [
        (r, randn(*r.shape, seed=90 + i).to(r.dtype))
        for i, (r, use) in enumerate(zip(found, results or [True] * len(found), strict=True))
        if use and r.numel() and r.requires_grad
    ]
    if used:
        torch.autograd.backward(*zip(*used, strict=True))
    return [leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves]


def assert_gradients(op: Op, *args: Any, by: Callable[..., Any] | None = None, **how: Any) -> list[Tensor | None]:
    bound = op.bind(*args)
    found = gradients(by or op, bound, **how)
    eager = gradients(op.reference, bound, **how)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in bound)
    truth = gradients(op.reference, wide, **how)
    assert [g is None for g in found] == [g is None for g in eager]
    assert_close(*([g for g in grads if g is not None] for grads in (found, eager, truth)))
    return found


def by_passes(op: Op) -> Callable[..., Any]:
    """The Op with its own passes on the CPU too, where PyTorch's own are taken for layer norms."""
    return op.with_backward("ours") if "ours" in op.impls else op


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Impl of layer norms that is not differentiable, so that the Op's own passes are run."""
    for op in (layer_norm, add_layer_norm):
        impls = dict(op.impls)
        monkeypatch.setattr(op, "impls", impls)
        op.impl("ours")(lambda *args, op=op: op.reference(*args))


def arguments(op: Op, *shape: int, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {name: randn(*shape, dtype=dtype, seed=s) for s, name in enumerate(("x", "residual"))}
    given |= {name: randn(shape[-1], dtype=dtype, seed=s) for s, name in enumerate(("weight", "bias"), 2)}
    given |= changes
    bound: tuple[Any, ...] = op.bind(**{k: v for k, v in given.items() if k in op.signature.parameters})
    return bound


@DTYPE
@pytest.mark.parametrize("n", [33, 128, 768, 4096, 16384])
def test_every_impl_at_every_width(n: int, dtype: torch.dtype) -> None:
    grad, x, extra, weight, bias = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((3, n),) * 3 + ((n,),) * 2))
    further: dict[str, Any] = {"narrow": torch.bfloat16, "dx_sum": True, "normed": torch.float16}
    for values, named in ((x * 0.5 - 20, {}), (x, further)):
        assert_impls(layer_norm_backward, grad, values, weight, bias, 1e-12, extra, **named)
        assert_impls(rms_norm_backward, grad, values, weight, 1e-12, extra, **named)


@NORMS
@DTYPE
def test_gradients(op: Op, dtype: torch.dtype) -> None:
    assert_gradients(op, *arguments(op, 3, 7, 96, dtype=dtype), by=by_passes(op))
    far = randn(5, 33, dtype=dtype) * 0.5 - 20
    assert_gradients(op, *arguments(op, 5, 33, dtype=dtype, x=far, weight=None), by=by_passes(op))


@NORMS
@pytest.mark.parametrize(
    ("of_x", "of_weight"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_weights_of_another_dtype(op: Op, of_x: torch.dtype, of_weight: torch.dtype) -> None:
    given = arguments(op, 6, 96, dtype=of_x, weight=randn(96, dtype=of_weight, seed=5))
    for run in (by_passes(op), op):
        found = assert_gradients(op, *given, by=run)
        assert [g.dtype for g in found if g is not None] == [a.dtype for a in given if isinstance(a, Tensor)]


@NORMS
def test_only_those_that_are_wanted(op: Op) -> None:
    given = arguments(op, 4, 96)
    count = sum(isinstance(a, Tensor) for a in given)
    for wanted in itertools.product((False, True), repeat=count):
        if any(wanted):
            assert_gradients(op, *given, by=by_passes(op), wanted=(*wanted, *(False,) * len(given)))


@pytest.mark.parametrize("op", [add_layer_norm, add_rms_norm], ids=lambda op: op.name)
def test_with_either_result_or_both(op: Op) -> None:
    for results in ((True, True), (True, False), (False, True)):
        for run in (by_passes(op), op):
            assert_gradients(op, *arguments(op, 4, 96), by=run, results=results)
    assert_gradients(op, *arguments(op, 4, 96, keep_sum=False), by=by_passes(op))
    alone = gradients(by_passes(op), arguments(op, 4, 96), results=(False, True))
    assert alone[0] is not None
    assert alone[1] is not None
    assert torch.equal(alone[0], alone[1])


@NORMS
def test_strided_inputs(op: Op) -> None:
    transposed, rows = randn(96, 7).t(), randn(7, 192)[:, ::2]
    assert_gradients(op, *arguments(op, 7, 96, x=transposed, residual=rows), by=by_passes(op))
    assert_gradients(op, *arguments(op, 96), by=by_passes(op))
    assert all(g is None or not g.count_nonzero() for g in gradients(by_passes(op), arguments(op, 0, 96)))


@NORMS
def test_a_sum_of_the_result(op: Op) -> None:
    """Its gradient is one number, expanded."""

    def total(*args: Any) -> Tensor:
        return tensors(by_passes(op)(*args))[0].sum()

    def reference(*args: Any) -> Tensor:
        return tensors(op.reference(*args))[0].sum()

    given = arguments(op, 5, 96)
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in given)
    found, eager, truth = gradients(total, given), gradients(reference, given), gradients(reference, wide)
    assert_close(*([g for g in grads if g is not None] for grads in (found, eager, truth)))


def kept_by(run: Callable[..., Any], *args: Any) -> list[Tensor]:
    """What is kept for the backward pass beyond arguments and results."""
    kept: list[Tensor] = []
    given = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        results = tensors(run(*given))
    known = {t.data_ptr() for t in (*given, *results) if isinstance(t, Tensor)}
    return [t for t in kept if t.data_ptr() not in known]


def test_little_is_kept() -> None:
    for op in (layer_norm, rms_norm, add_layer_norm, add_rms_norm):
        assert not kept_by(by_passes(op), *arguments(op, 5, 96))
    kept: list[int] = []
    x, residual, weight, *rest = (
        a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments(add_rms_norm, 5, 96)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        _, total = add_rms_norm(x, residual, weight, *rest)
    assert set(kept) == {total.data_ptr(), weight.data_ptr()}
    cos, sin = torch.randn(6, 8), torch.randn(6, 8)
    x = randn(1, 2, 6, 8).requires_grad_()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        rope(x, cos, sin)
    assert set(kept) == {cos.data_ptr(), sin.data_ptr()}


def test_on_the_cpu_layer_norm_is_pytorchs_own() -> None:
    args = arguments(layer_norm, 5, 96)
    ours = gradients(layer_norm, args)
    theirs = gradients(lambda x, w, b, eps: F.layer_norm(x, (96,), w, b, eps), args)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(
    "name",
    [
        *("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "embedding", "embedding_layer_norm", "rope"),
        *("rope_qk", "linear", "linear_rope", "linear_add_rms_norm", "linear_add_layer_norm", "rms_norm_linear"),
    ],
)
def test_the_same_bits_each_time(name: str) -> None:
    op = OPS[name]
    for sample in op.samples("cpu", torch.float32):
        args = op.bind(*sample.args, **sample.kwargs)
        for first, again in zip(gradients(op, args), gradients(op, args), strict=True):
            assert (first is None) == (again is None)
            assert first is None or again is None or torch.equal(first, again)


def index(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@DTYPE
def test_embeddings(dtype: torch.dtype) -> None:
    word, position = randn(9, 40, dtype=dtype), randn(50, 40, dtype=dtype, seed=1)
    ids, positions = index(3, 33, below=9), torch.arange(33)[None]
    assert_gradients(embedding, ids, word)
    assert_gradients(embedding, ids.int(), word, index(3, 33, below=50).int(), position)
    for wanted in ((False, True, False, False), (False, False, False, True)):
        assert_gradients(embedding, ids, word, index(3, 33, below=50), position, wanted=wanted)
    _, _, _, dposition = assert_gradients(embedding, ids, word.float(), positions, position.float())
    assert dposition is not None
    assert not dposition[33:].count_nonzero()


def test_many_equal_ids_in_half_precision() -> None:
    """A sum of 4096 terms in bfloat16 would stop growing at 256."""
    grad, ids = torch.ones(4096, 8, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)
    assert embedding_backward(grad, ids, 2).tolist() == [[4096.0] * 8, [0.0] * 8]


def test_ids_that_are_in_no_table() -> None:
    grad, ids = torch.ones(3, 4), torch.tensor([1, 5, -1])
    for impl in embedding_backward.impls.values():
        assert impl.fn(grad, ids, 2).tolist() == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("interleaved", [False, True])
@DTYPE
def test_rope(interleaved: bool, dtype: torch.dtype) -> None:
    """With tables that are not alike in both halves, too."""
    q, k, cos, sin = (
        randn(*s, dtype=dtype, seed=i) for i, s in enumerate(((2, 4, 6, 10), (2, 2, 6, 10), (6, 8), (6, 8)))
    )
    strided = randn(2, 6, 4, 10, dtype=dtype).transpose(1, 2)
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            assert_gradients(rope, q, cos, sin, interleaved, wanted=(*wanted, False))
            assert_gradients(rope_qk, strided, k, cos[None], sin[None], interleaved, wanted=(True, *wanted, False))
    for results in ((True, False), (False, True)):
        assert_gradients(rope_qk, q, k, cos, sin, interleaved, wanted=(True, True, False, True, False), results=results)
    assert_gradients(rope_qk, q, k, cos, sin, interleaved, wanted=(False, True, False, False, False))


def test_only_those_of_a_product_with_rope_that_are_wanted() -> None:
    sample = next(s for s in linear_rope.samples("cpu", torch.float32) if s.label == "head_dim 20")
    for wanted in itertools.product((False, True), repeat=5):
        if any(wanted):
            assert_gradients(linear_rope, *sample.args, wanted=(*wanted, False, False))


def test_linear_is_made_of_pytorchs_operators() -> None:
    args = randn(5, 8), randn(6, 8, seed=1), randn(6, seed=2), "gelu", randn(5, 6, seed=3)
    ours = gradients(linear, args)
    theirs = gradients(lambda x, w, b, _, r: F.gelu(F.linear(x, w, b)) + r, args)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None)


def test_a_second_derivative_that_is_not_there_says_what_to_do() -> None:
    x, residual = (randn(3, 8, seed=s).requires_grad_() for s in (0, 1))
    normed, _ = add_rms_norm(x, residual)
    with pytest.raises(RuntimeError, match=r"burnish.use\(add_rms_norm='reference'\)"):
        torch.autograd.grad(normed.sum(), x, create_graph=True)
    with burnish.use(add_rms_norm="reference"):
        normed, _ = add_rms_norm(x, residual)
        (first,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)


X, IDS = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        ("rms_norm_backward", (X[:1], X, None, 1e-6), ValueError, r"grad has shape \(1, 4\); it must be x's, \(2, 4\)"),
        ("rms_norm_backward", (X.long(), X, None, 1e-6), TypeError, "grad has dtype torch.int64; it must be a"),
        ("rms_norm_backward", (X, X, X, 1e-6), ValueError, r"weight has shape \(2, 4\)"),
        ("layer_norm_backward", (X, X, None, None, 1e-6, X[0]), ValueError, r"grad_sum has shape \(4,\)"),
        ("layer_norm_backward", (X, X, None, X, 1e-6), ValueError, r"bias has shape \(2, 4\)"),
        (
            "rms_norm_backward",
            (X, X, None, 1e-6, None, True, torch.float32),
            TypeError,
            "narrow is torch.float32; it must be torch.float16, torch.bfloat16 or None",
        ),
        (
            "layer_norm_backward",
            (X, X, None, None, 1e-6, None, True, True, None, False, torch.int64),
            TypeError,
            "normed is torch.int64",
        ),
        (
            "embedding_backward",
            (X, torch.zeros(3).long(), 5),
            ValueError,
            r"for ids of \(3,\) it must be \(\*ids.shape",
        ),
        ("embedding_backward", (X, torch.zeros(2), 5), TypeError, "ids has dtype torch.float32; it must be int32 or"),
        ("embedding_backward", (X, torch.zeros(2).long(), 0), ValueError, "entries is 0; a table has at least one"),
        ("embedding_backward", (X, IDS, 3, X), ValueError, r"table_grad has shape \(2, 4\); it must be \(3, 4\): the"),
        ("embedding_backward", (X, IDS, 2, X.long()), TypeError, "table_grad has dtype torch.int64; it must be a"),
        ("embedding_backward", (X, IDS, 2, None, X.sum()), ValueError, "scale is given where table_grad is None"),
        ("embedding_backward", (X, IDS, 2, X, X), ValueError, r"scale has shape \(2, 4\); it must be one number"),
    ],
)
def test_bad_input_is_named(name: str, args: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OPS[name](*args)
