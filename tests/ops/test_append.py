"""New rows of a cache: where they go, what is dropped, and that nothing else changes, in copies and in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.numerics import assert_close, oracle, randn
from burnish.op import OPS, Op, Sample
from burnish.ops import append_kv, layer_norm, linear_rope_append, rope, rope_append, rope_qk
from burnish.ops.append_kv import append_by_index, append_by_slices
from tests.ops.matrix import DTYPES, assert_impls
from tests.ops.test_rope import tables

BOTH = pytest.mark.parametrize("op", [append_kv, rope_append], ids=lambda op: op.name)
LENGTHS = pytest.mark.parametrize(
    "lengths",
    [torch.tensor(3), torch.tensor([0]), torch.tensor([2, 7], dtype=torch.int32), torch.tensor([10, 12]),
     torch.tensor([8, 500])],
    ids=lambda t: f"{t.tolist()}",
)  # fmt: skip


def copied(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v.clone() if isinstance(v, Tensor) else v for v in values)


def one_by_one(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """What appending means, row by row."""
    out = cache.clone()
    for b, start in enumerate(lengths.reshape(-1).expand(cache.shape[0]).tolist()):
        for i in range(new.shape[2]):
            if start + i < cache.shape[2]:
                out[b, :, start + i] = new[b, :, i]
    return out


def filled(s: int = 5, most: int = 12, d: int = 8, dv: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two caches and what is new."""
    sizes = [(most, d), (most, dv), (s, d), (s, dv)]
    return [randn(2, 3, length, width, dtype=dtype, seed=seed) for seed, (length, width) in enumerate(sizes)]


@LENGTHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [1, 5, 20])
def test_rows_go_behind_those_that_are_there(s: int, dtype: torch.dtype, lengths: Tensor) -> None:
    k_cache, v_cache, k, v = filled(s, dtype=dtype)
    assert_impls(append_kv, k_cache, v_cache, k, v, lengths)
    for fn in (append_kv, append_kv.reference, append_kv.impls["torch"].fn):
        new_k, new_v = fn(k_cache, v_cache, k, v, lengths)
        assert torch.equal(new_k, one_by_one(k_cache, k, lengths))
        assert torch.equal(new_v, one_by_one(v_cache, v, lengths))


@LENGTHS
@pytest.mark.parametrize("s", [1, 5, 12, 20])
@pytest.mark.parametrize("by", [append_by_slices, append_by_index])
def test_both_ways_to_write(by: Any, s: int, lengths: Tensor) -> None:
    cache, _, new, _ = filled(s)
    last = cache.transpose(1, 2).contiguous().transpose(1, 2)  # heads after positions in memory
    expected = one_by_one(cache, new, lengths)
    for written in (cache, last):
        by(written, new, lengths)
        assert torch.equal(written, expected)


def test_token_by_token_is_all_at_once() -> None:
    k_cache, v_cache, k, v = filled()
    stepwise = k_cache, v_cache
    for i in range(k.shape[2]):
        stepwise = append_kv(*stepwise, k[:, :, i : i + 1], v[:, :, i : i + 1], torch.tensor([2, 4]) + i)
    for one, other in zip(stepwise, append_kv(k_cache, v_cache, k, v, torch.tensor([2, 4])), strict=True):
        assert torch.equal(one, other)


@LENGTHS
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_and_appending_is_the_one_and_then_the_other(interleaved: bool, lengths: Tensor) -> None:
    k_cache, v_cache, k, v = filled()
    q, (cos, sin) = randn(2, 6, 5, 8, seed=5), tables(5, 6, interleaved, start=3)
    arguments = q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved
    assert_impls(rope_append, *arguments)
    new_q, new_k, new_v = rope_append(*arguments)
    expected_q, rotated = rope_qk(q, k, cos, sin, interleaved)
    assert torch.equal(new_q, expected_q)
    assert torch.equal(new_k, one_by_one(k_cache, rotated, lengths))
    assert torch.equal(new_v, one_by_one(v_cache, v, lengths))


SAMPLES = [
    pytest.param(op, impl, sample, id=f"{op.name} {impl} {sample.label}")
    for op in (append_kv, rope_append)
    for impl in op.impls
    for sample in op.samples("cpu", torch.bfloat16)
    if op.impls[impl].in_place is not None and not op.impls[impl].why_not(*sample.args)
]


@pytest.mark.parametrize(("op", "impl", "sample"), SAMPLES)
def test_in_place_writes_the_new_rows_and_nothing_else(op: Op, impl: str, sample: Sample) -> None:
    bound = op.bind(*sample.args, **sample.kwargs)
    args = copied(bound)
    names, in_place = list(op.signature.parameters), op.impls[impl].in_place
    assert in_place is not None
    results, expected = in_place(*args), op.impls[impl].fn(*bound)
    lengths = args[names.index("lengths")].reshape(-1, 1)
    for i, (before, after) in enumerate(zip(bound, args, strict=True)):
        if i in op.donates:
            assert results[op.donates[i]] is after
            position = torch.arange(after.shape[2])
            new = (position >= lengths) & (position < lengths + args[names.index("k")].shape[2])
            same = (after == before).all(dim=3).all(dim=1)
            assert torch.equal(~same, new.expand_as(same))
        elif isinstance(before, Tensor):
            assert torch.equal(before, after)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)
        assert result.stride() == other.stride()


def test_only_these_ops_donate() -> None:
    assert append_kv.donates == {0: 0, 1: 1}
    assert rope_append.donates == linear_rope_append.donates == {5: 1, 6: 2}
    for op in OPS.values():
        for impl in op.impls.values():
            needs_no_copy = impl.name in ("reference", "symmetric", "symmetric_rows")  # they leave x as it is
            assert (impl.in_place is not None) == (bool(op.donates) and not needs_no_copy)
    with pytest.raises(ValueError, match="layer_norm donates no argument that the Impl 'new' could write into"):
        layer_norm.impl("new", in_place=lambda *_: None)


@BOTH
def test_the_cost_is_that_of_the_new_rows(op: Op) -> None:
    def cost(most: int, s: int) -> int:
        k_cache, v_cache, k, v = filled(s, most)
        if op is append_kv:
            return op.cost(k_cache, v_cache, k, v, torch.tensor(0)).bytes
        return op.cost(k, k, v, *tables(s, 8), k_cache, v_cache, torch.tensor(0)).bytes

    assert cost(12, 1) == cost(1000, 1) < cost(12, 5)
    assert append_kv.cost(*filled(1), torch.tensor(0)).bytes == 2 * 4 * 2 * 3 * (8 + 6) + 8


@BOTH
def test_fake_tensors_need_no_length(op: Op) -> None:
    sample = next(op.samples("cpu", torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample.args]
        for fn in (op, op.reference, op.shape):
            results = fn(*op.bind(*fake))
            for i, result in op.donates.items():
                assert results[result].shape == fake[i].shape


class Append(nn.Module):
    def forward(self, *args: Any) -> Any:
        return append_kv(*args)


class Reference(nn.Module):
    def forward(self, *args: Any) -> Any:
        return append_kv.reference(*args)


@pytest.mark.parametrize("module", [Append(), Reference()], ids=["one node", "the reference"])
def test_export_with_every_size_dynamic(module: nn.Module) -> None:
    b, s, most = (torch.export.Dim(name) for name in ("b", "s", "most"))
    shapes = ({0: b, 2: most}, {0: b, 2: most}, {0: b, 2: s}, {0: b, 2: s}, {0: b})
    program = torch.export.export(
        module, (*filled(), torch.tensor([2, 4])), dynamic_shapes=(shapes,), strict=False
    ).module()
    args = *(torch.cat((t, t, t)) for t in filled(9, 30)), torch.tensor([1, 2, 3, 4, 5, 29])
    for result, expected in zip(program(*args), append_kv.reference(*args), strict=True):
        assert torch.equal(result, expected)


@BOTH
def test_gradients_reach_what_was_appended_and_what_was_kept(op: Op) -> None:
    k_cache, v_cache, k, v = (t.requires_grad_() for t in filled())
    args: tuple[Any, ...] = (k_cache, v_cache, k, v, torch.tensor([2, 10]))
    if op is rope_append:
        args = (randn(2, 3, 5, 8), k, v, *tables(5, 8), *args[:2], args[4])
    new_k, new_v = op(*args)[-2:]
    (new_k.sum() + new_v.sum()).backward()
    assert v.grad is not None
    assert v.grad[0].eq(1).all()
    assert v.grad[1, :, :, 0].tolist() == [[1, 1, 0, 0, 0]] * 3  # three did not fit
    assert v_cache.grad is not None
    assert v_cache.grad[0, 0, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_tables_of_another_dtype_are_refused_by_the_impl_and_right_by_the_op() -> None:
    k_cache, v_cache, k, v = filled(dtype=torch.bfloat16)
    args = k, k, v, *tables(5, 8), k_cache, v_cache, torch.tensor(2)
    assert rope_append.impls["torch"].why_not(*args) == rope.impls["torch"].why_not(k, *tables(5, 8))
    results = rope_append(*args)
    assert_close(results, rope_append.reference(*args), oracle(rope_append.reference, *args))


C, N, T = torch.ones(2, 3, 9, 8), torch.ones(2, 3, 4, 8), torch.ones(4, 8)
ONE = torch.tensor(1)


@pytest.mark.parametrize(
    ("op", "args", "error", "says"),
    [
        (append_kv, (C, C, N[0], N, ONE), ValueError, r"k has shape \(3, 4, 8\); it must be"),
        (append_kv, (C, C, N, N[:, :, 1:], ONE), ValueError, r"v has shape \(2, 3, 3, 8\); for k of \(2, 3, 4, 8\)"),
        (append_kv, (C[:, :2], C, N, N, ONE), ValueError, r"k_cache has shape \(2, 2, 9, 8\); for new ones of"),
        (append_kv, (C, C[..., 1:], N, N, ONE), ValueError, r"v_cache has shape \(2, 3, 9, 7\)"),
        (append_kv, (C, C[:, :, 1:], N, N, ONE), ValueError, "v_cache has 8 positions where k_cache has 9"),
        (append_kv, (C.long(), C, N, N, ONE), TypeError, "k_cache has dtype torch.int64 where k has torch.float32"),
        (append_kv, (C, C, N, N.half(), ONE), TypeError, "v has dtype torch.float16 where k has torch.float32"),
        (append_kv, (C, C, N.int(), N, ONE), TypeError, "k has dtype torch.int32; it must be a floating"),
        (append_kv, (C, C, N, N, ONE.float()), TypeError, "lengths has dtype torch.float32; it must be int32 or int64"),
        (append_kv, (C, C, N, N, ONE.expand(3)), ValueError, r"lengths has shape \(3,\)"),
        (append_kv, (C, C, N, N, ONE.expand(2, 1)), ValueError, r"lengths has shape \(2, 1\)"),
        (rope_append, (N, N, N, T[1:], T[1:], C, C, ONE), ValueError, r"cos has shape \(3, 8\)"),
        (rope_append, (N[:1], N, N, T, T, C, C, ONE), ValueError, r"k has shape \(2, 3, 4, 8\); for q of"),
        (rope_append, (N, N, N, T, T, C, C[:1], ONE), ValueError, r"v_cache has shape \(1, 3, 9, 8\)"),
    ],
)
def test_bad_input_is_named(op: Op, args: tuple[Tensor, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        op(*args)
