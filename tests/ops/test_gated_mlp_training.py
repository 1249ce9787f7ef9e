"""The gated MLP's passes for training: its gradients, which of them are computed, and what is kept between the two."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import burnish
from burnish.numerics import assert_close, randn
from burnish.ops import gate, gated_mlp
from burnish.ops._activations import GATES

WIDTH, INNER, OUT = 48, 40, 56


def arguments(activation: str = "silu", dtype: torch.dtype = torch.float32, biases: bool = True) -> tuple[Any, ...]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, seed=seed)

    weights = tensor(2 * INNER, WIDTH, seed=1) / WIDTH**0.5, tensor(OUT, INNER, seed=2) / INNER**0.5
    of = (tensor(2 * INNER, seed=3), tensor(OUT, seed=4)) if biases else (None, None)
    return tensor(3, 7, WIDTH, seed=0), *weights, *of, activation


def gradients(fn: Any, args: tuple[Any, ...], wanted: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    leaves = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(want) if isinstance(a, Tensor) else a
        for a, want in zip(args, wanted, strict=True)
    ]
    fn(*leaves).backward(grad)
    return [leaf.grad if isinstance(leaf, Tensor) else None for leaf in leaves]


def assert_gradients(fn: Any, args: tuple[Any, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    grad = randn(*args[0].shape[:-1], args[2].shape[0], dtype=args[0].dtype, seed=9)
    found = gradients(fn, args, wanted, grad)
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    eager = gradients(gated_mlp.reference, args, wanted, grad)
    assert_close(found, eager, gradients(gated_mlp.reference, wide, wanted, grad.double()))
    return found


ALL = (True, True, True, True, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", GATES)
def test_gradients(activation: str, dtype: torch.dtype) -> None:
    assert_gradients(gated_mlp, arguments(activation, dtype), ALL)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=5) if any(w)])
def test_only_those_that_are_wanted(wanted: tuple[bool, ...]) -> None:
    found = assert_gradients(gated_mlp, arguments(), (*wanted, False))
    assert [g is not None for g in found] == [*wanted, False]


@pytest.mark.parametrize("impl", ["onednn", "torch", "reference"])
def test_an_impl_that_is_named_runs_forward(impl: str) -> None:
    def run(*args: Any) -> Tensor:
        with burnish.use(gated_mlp=impl):
            return gated_mlp(*args)

    for wanted in (ALL, (False, False, True, False, True, False), (False,) * 4 + (True, False)):
        assert_gradients(run, arguments(), wanted)


def test_strides_and_a_single_row() -> None:
    x, gate_up, down, *rest = arguments()
    strided = x.transpose(0, 1), gate_up.t().contiguous().t(), torch.cat((down, down), dim=1)[:, :INNER]
    assert_gradients(gated_mlp, (*strided, *rest), ALL)
    assert_gradients(gated_mlp, (x[0, 0], gate_up, down, *rest), ALL)


def test_no_rows() -> None:
    x, *rest = arguments()
    found = gradients(gated_mlp, (x[:0], *rest), ALL, x.new_zeros(0, 7, OUT))
    assert [int(g.count_nonzero()) for g in found if g is not None] == [0] * 5


def test_what_is_kept_is_the_first_product_alone() -> None:
    x, *rest = (a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments())
    kept: list[Tensor] = []
    given = {a.data_ptr() for a in (x, *rest) if isinstance(a, Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_mlp(x, *rest)
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == [(3, 7, 2 * INNER)]


def test_the_same_bits_each_time() -> None:
    args, grad = arguments(), randn(3, 7, OUT, seed=9)
    first, again = (gradients(gated_mlp, args, ALL, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))  # type: ignore[arg-type]


def test_second_derivatives_go_through_the_reference() -> None:
    def penalty(fn: Any, dtype: torch.dtype) -> list[Tensor]:
        args = tuple(a.to(dtype).requires_grad_() if isinstance(a, Tensor) else a for a in arguments("gelu"))
        first = torch.autograd.grad(fn(*args).sum(), args[:5], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), args[:4]))

    eager, truth = (penalty(gated_mlp.reference, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(penalty(gated_mlp, torch.float32), eager, truth)


@pytest.mark.parametrize("activation", GATES)
def test_a_gate_by_itself(activation: str) -> None:
    gate_up, grad = randn(5, 2 * INNER, seed=0), randn(5, INNER, seed=1)

    def gradient(fn: Any, dtype: torch.dtype) -> Tensor:
        leaf = gate_up.to(dtype).requires_grad_()
        return torch.autograd.grad(fn(leaf, activation), leaf, grad.to(dtype))[0]

    truth = gradient(gate.reference, torch.float64)
    assert_close(gradient(gate, torch.float32), gradient(gate.reference, torch.float32), truth)


def test_bad_inputs_of_a_gate() -> None:
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 5\)"):
        gate(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="gate_up has dtype"):
        gate(torch.zeros(2, 4, dtype=torch.long))
