"""Cross entropy and its product with the vocabulary: what they mean, their gradients, and what they take of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import burnish
from burnish.numerics import assert_close, oracle, randn
from burnish.ops import (
    cross_entropy,
    cross_entropy_with_gradient,
    linear_cross_entropy,
    linear_cross_entropy_with_gradients,
    scale_gradient,
)
from burnish.ops._cross_entropy import targets
from burnish.ops._linear_cross_entropy import Chunks, chunk_configs
from tests.ops.matrix import assert_impls

CPU = torch.device("cpu")
TORCHS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "ignore_index": st.sampled_from([-100, -1, 3]),
    }
)
OURS = st.fixed_dictionaries(
    {"z_loss": st.sampled_from([0.0, 1e-4, 0.1]), "softcap": st.sampled_from([None, 5.0, 30.0])}
)


def product(rows: int, k: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = randn(rows, k, dtype=dtype, seed=1), randn(size, k, seed=2) / k**0.5
    return x, weight.to(dtype), targets(rows, size, CPU, 3)


def gradients(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Any, scale: float = 1.0) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    return list(torch.autograd.grad((loss(*leaves, *rest) * scale).sum(), leaves))


def assert_gradients(
    loss: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    *rest: Any,
    scale: float = 1.0,
) -> None:
    wide = tuple(leaf.double() for leaf in leaves)
    truth = gradients(eager, wide, *rest, scale=scale)
    assert_close(gradients(loss, leaves, *rest, scale=scale), gradients(eager, leaves, *rest, scale=scale), truth)


# --- what it means ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 2, 33, 257, 1000]), TORCHS, st.integers(0, 99))
def test_it_is_pytorchs(rows: int, size: int, options: dict[str, Any], seed: int) -> None:
    logits = randn(rows, size, seed=seed)
    target = targets(rows, size, CPU, seed, options["ignore_index"])
    target[-1] = 0  # one that counts

    def torchs(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, **options)

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, target, **options)

    assert_close(ours(logits), torchs(logits), torchs(logits.double()))
    assert_gradients(ours, torchs, (logits,), scale=0.3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 33, 257]), TORCHS, OURS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_option_at_once(
    rows: int, size: int, torchs: dict[str, Any], ours: dict[str, Any], dtype: torch.dtype
) -> None:
    logits, target = randn(rows, size, dtype=dtype) * 3, targets(rows, size, CPU, rows, torchs["ignore_index"])
    target[0] = 0 if torchs["ignore_index"] != 0 else size - 1
    assert_impls(cross_entropy, logits, target, **torchs, **ours)
    assert_impls(cross_entropy_with_gradient, logits, target, **torchs, **ours)


def test_the_options_as_their_sources_write_them() -> None:
    logits, target = randn(5, 40), torch.arange(5)
    logp = logits.log_softmax(-1)
    each = cross_entropy(logits, target, reduction="none")
    assert_close(each, -logp[range(5), range(5)], -logits.double().log_softmax(-1)[range(5), range(5)])
    z = (cross_entropy(logits, target, z_loss=0.5, reduction="none") - each).double()
    assert_close(z.float(), 0.5 * logits.logsumexp(-1) ** 2, 0.5 * logits.double().logsumexp(-1) ** 2)
    capped = cross_entropy(logits, target, softcap=2.0)
    by_hand = [F.cross_entropy(2 * torch.tanh(given / 2), target) for given in (logits, logits.double())]
    assert_close(capped, *by_hand)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_far_from_zero(dtype: torch.dtype) -> None:
    logits = (randn(6, 257, outliers=0.0) + torch.tensor([1e4, -1e4, 0, 1e4, 3e4, -3e4])[:, None]).to(dtype)
    logits[3, ::2] = -1e4
    assert_impls(cross_entropy, logits, torch.arange(6), reduction="none", label_smoothing=0.1)
    assert_impls(cross_entropy_with_gradient, logits, torch.arange(6), reduction="sum")


def test_half_precision_gives_a_float32_loss() -> None:
    logits, target = randn(4, 30, dtype=torch.bfloat16), torch.arange(4)
    assert cross_entropy(logits, target).dtype == torch.float32
    assert cross_entropy(logits.double(), target).dtype == torch.float64
    assert linear_cross_entropy(*product(4, 8, 30, torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(smoothing: float) -> None:
    target = torch.full((4,), -100)
    logits = randn(4, 30).requires_grad_()
    eager = F.cross_entropy(logits, target, label_smoothing=smoothing)
    loss = cross_entropy(logits, target, label_smoothing=smoothing)
    assert eager.isnan()
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert cross_entropy(logits, target, reduction="sum") == 0
    x, weight, _ = product(4, 8, 30)
    loss = linear_cross_entropy(x, weight.requires_grad_(), target)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, weight)[0].any()


def test_an_ignored_row_may_hold_anything() -> None:
    logits, target = randn(4, 30), torch.tensor([1, -100, 2, -100])
    logits[1], logits[3, ::2] = math.nan, math.inf
    loss, gradient = cross_entropy_with_gradient(logits, target)
    assert torch.isfinite(loss)
    assert gradient.isfinite().all()
    assert not gradient[[1, 3]].any()


def test_masked_logits() -> None:
    logits, target = randn(3, 30), torch.tensor([0, 2, 4])
    logits[:, 1::2] = -math.inf
    assert_impls(cross_entropy, logits, target)
    assert_impls(cross_entropy_with_gradient, logits, target)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"target": torch.tensor([0, 30, 2, 3])},
            ValueError,
            "target has 30 at row 1; it must be from 0 to 29, or -1",
        ),
        ({"target": torch.tensor([0, 1, 2, -1])}, ValueError, r"target has -1 at row 3"),
        ({"target": torch.arange(3)}, ValueError, r"target has shape \(3,\); it must be \(4,\)"),
        ({"target": torch.arange(4).int()}, TypeError, "target has dtype torch.int32; it must be torch.int64"),
        ({"logits": torch.zeros(4, 30).long()}, TypeError, "logits has dtype torch.int64"),
        ({"logits": torch.zeros(2, 2, 30)}, ValueError, r"logits has shape \(2, 2, 30\); it must be \(T, V\)"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; it must be between 0 and 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0; it must be a factor of at least 0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; it must be above 0, or None"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'; it must be one of mean, sum, none"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"logits": torch.zeros(4, 30), "target": torch.arange(4), **changes}
    with pytest.raises(error, match=message):
        cross_entropy(**args)
    with pytest.raises(error, match=message):
        cross_entropy_with_gradient(**args)
    if "logits" not in changes:
        args["x"], args["weight"] = args.pop("logits")[:, :8], torch.zeros(30, 8)
        with pytest.raises(error, match=message):
            linear_cross_entropy(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(30, 7)}, r"weight has shape \(30, 7\); for x of \(4, 8\) it must be \(V, K\)"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\); it must be \(30,\)"),
        ({"x": torch.zeros(2, 2, 8)}, r"x has shape \(2, 2, 8\); it must be \(T, K\)"),
        ({"grad_loss": torch.zeros(4)}, r"grad_loss has shape \(4,\); it must be one number, as the loss"),
        ({"grad_loss": torch.zeros(()), "reduction": "none"}, r"grad_loss has shape \(\); it must be \(4,\)"),
        ({"reduction": "none"}, "with reduction 'none' a weight has no gradient before each loss has one"),
        ({"needs_bias": True}, "needs_bias is set where bias is None"),
    ],
)
def test_wrong_arguments_of_the_product(changes: dict[str, Any], message: str) -> None:
    args = {"x": torch.zeros(4, 8), "weight": torch.zeros(30, 8), "target": torch.arange(4), **changes}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_with_gradients(**args)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.7])
def test_gradients_of_a_scaled_loss(dtype: torch.dtype, reduction: str, scale: float) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "reduction": reduction}
    x, weight, target = product(11, 24, 130, dtype)
    bias = randn(130, dtype=dtype, seed=4)
    logits = F.linear(x, weight, bias)
    assert_gradients(
        lambda logits: cross_entropy(logits, target, **options),
        lambda logits: cross_entropy.reference(logits, target, **options),
        (logits,),
        scale=scale,
    )
    assert_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, target, b, **options),
        lambda x, w, b: linear_cross_entropy.reference(x, w, target, b, **options),
        (x, weight, bias),
        scale=scale,
    )


def test_gradients_of_float16_survive_a_small_share() -> None:
    """1 / 64 of a probability of 8e-7 is nothing in float16; a GradScaler's factor keeps it."""
    logits = (randn(64, 1000, outliers=0.0) / 10).half()
    logits[:, 0] = 14
    target = torch.arange(64)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, target) / 1000

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target) / 1000

    assert_gradients(loss, eager, (logits,), scale=65536.0)
    assert (gradients(loss, (logits,), scale=65536.0)[0] != 0).all()


def test_a_kept_graph_gives_its_gradient_again() -> None:
    logits, target = randn(5, 40).requires_grad_(), torch.arange(5)
    expected = gradients(F.cross_entropy, (logits,), target)[0]
    loss = cross_entropy(logits, target)
    (third,) = torch.autograd.grad(loss / 4, logits, retain_graph=True)
    first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    first.zero_()  # nobody else's
    (last,) = torch.autograd.grad(loss * 2, logits)
    for found, factor in ((third, 0.25), (again, 1), (last, 2)):
        torch.testing.assert_close(found, expected * factor)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_is_given_away_without_a_copy() -> None:
    logits, target = randn(5, 40).requires_grad_(), torch.arange(5)
    loss = cross_entropy(logits, target)
    kept = loss.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
    address = kept.data_ptr()
    del kept
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.data_ptr() == address


def test_gradients_add_up_over_batches() -> None:
    x, weight, _ = product(12, 16, 50)
    target = torch.arange(12)
    weight.requires_grad_()
    expected = gradients(lambda w: linear_cross_entropy.reference(x, w, target), (weight,))[0]
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        (linear_cross_entropy(x[rows], weight, target[rows]) / 3).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_two_losses_of_one_tensor() -> None:
    logits, target = randn(5, 40).requires_grad_(), torch.arange(5)
    (cross_entropy(logits, target) + 2 * cross_entropy(logits, target, z_loss=0.1)).backward()
    both = gradients(
        lambda t: cross_entropy.reference(t, target) + 2 * cross_entropy.reference(t, target, z_loss=0.1), (logits,)
    )
    torch.testing.assert_close(logits.grad, both[0])


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, ...], reduction: str) -> None:
    x, weight, target = product(9, 16, 50)
    leaves = [t.requires_grad_(want) for t, want in zip((x, weight, randn(50)), wanted, strict=True)]
    made: list[tuple[bool, ...]] = []
    plain = linear_cross_entropy_with_gradients.impls["torch"].fn

    def seen(*args: Any, **kwargs: Any) -> Any:
        results = plain(*args, **kwargs)
        made.append(tuple(t.numel() > 0 for t in results[1:]))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            linear_cross_entropy_with_gradients, "select", lambda *a: type("I", (), {"fn": staticmethod(seen)})
        )
        linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction=reduction).sum().backward()
    assert made == [wanted]
    assert tuple(leaf.grad is not None for leaf in leaves) == wanted


def test_second_derivatives_by_the_reference() -> None:
    logits, target = randn(3, 8, dtype=torch.float64).requires_grad_(), torch.arange(3)
    with burnish.use(cross_entropy="reference"):
        assert torch.autograd.gradgradcheck(lambda t: cross_entropy(t, target, z_loss=0.1), logits)
    with pytest.raises(RuntimeError, match=r"burnish.use\(cross_entropy='reference'\)"):
        torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)


def test_what_is_not_differentiated_has_no_gradient() -> None:
    x, weight, target = product(4, 8, 30)
    assert not linear_cross_entropy(x, weight, target).requires_grad
    with torch.no_grad():
        assert not cross_entropy(randn(4, 30).requires_grad_(), target).requires_grad


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scaling_in_place(factor: float) -> None:
    gradient = randn(5, 40)
    in_place = scale_gradient.impls["torch"].in_place
    assert in_place is not None
    expected = gradient * factor
    assert in_place(gradient, torch.tensor(factor)) is gradient
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_in_training(reduction: str) -> None:
    """In a recorded graph the logits are kept, and a product's gradients as eagerly."""
    torch._dynamo.reset()
    x, weight, target = product(9, 16, 50)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        fused = linear_cross_entropy(x, weight, target, reduction=reduction)
        return fused + cross_entropy(F.linear(x, weight), target, reduction=reduction)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return 2 * F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_gradients(compiled, eager, (x, weight), scale=0.3)


# --- memory and chunks ------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The bytes of tensors that were made within, and live: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def _storages(tree: Any) -> dict[int, Any]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


@contextmanager
def allocations() -> Iterator[Allocations]:
    with Allocations() as found:
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_in_memory_as_a_whole(dtype: torch.dtype) -> None:
    rows, k, size, chunk = 2048, 16, 4096, 128
    x, weight, target = product(rows, k, size, dtype)
    whole, of_chunk = rows * size * dtype.itemsize, chunk * size * dtype.itemsize
    with allocations() as eager:
        linear_cross_entropy.reference(x, weight, target)
    assert eager.peak >= whole
    results = (x.nbytes + weight.nbytes) * 3  # gradients, the weight's also in float32, and a chunk's share of it
    block = 2 * chunk * size * 4  # a chunk in float32, and its softmax
    for run, more in (
        (lambda: linear_cross_entropy.impls["torch"].fn(x, weight, target, config=Chunks(chunk)), 0),
        (
            lambda: linear_cross_entropy_with_gradients.impls["torch"].fn(x, weight, target, config=Chunks(chunk)),
            results,
        ),
    ):
        with allocations() as found:
            run()
        assert found.peak <= of_chunk + block + more + (1 << 16)
        assert found.peak < whole // 2


def test_between_the_passes_there_are_gradients_only() -> None:
    x, weight, target = product(64, 16, 512)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), target)
    kept = [t for t in loss.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert [t.shape for t in kept] == [x.shape, weight.shape]


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_any_size_give_the_same_numbers(rows: int, dtype: torch.dtype) -> None:
    x, weight, target = product(rows, 24, 131, dtype)
    target[0] = 5
    args = linear_cross_entropy_with_gradients.bind(x, weight, target, randn(131, dtype=dtype), needs_bias=True)
    reference = linear_cross_entropy_with_gradients.reference
    for chunk in (64, 128, 200, 10_000):
        found = linear_cross_entropy_with_gradients.impls["torch"].fn(*args, config=Chunks(chunk))
        assert_close(found, reference(*args), oracle(reference, *args))


def test_the_same_bits_each_time() -> None:
    args = product(300, 24, 131)
    runs = [linear_cross_entropy_with_gradients.impls["torch"].fn(*args, config=Chunks(128)) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(
    ("rows", "k", "size", "expected"), [(12288, 768, 50304, 2560), (4096, 2048, 128256, 1024), (64, 8, 100, 128)]
)
def test_chunks_for_models(rows: int, k: int, size: int, expected: int) -> None:
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((rows, k), (size, k)))
    first, *others = chunk_configs(x, weight)
    assert first.rows == expected
    for config in (first, *others):
        assert config.rows % 128 == 0
        assert config.rows == 128 or config.rows * size * 2 <= 512 << 20
