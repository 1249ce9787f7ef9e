"""Padding removed, and nested tensors, on a real device: any number of tokens by CUDA graphs, and gradients."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import burnish
from burnish.numerics import assert_close, oracle, randn
from burnish.ragged.entry import PackedEntry
from burnish.ragged.tokens import INPUTS, TokenMemory, tokens_of
from tests.kernels.test_tokens import MASKS as ANY_MASKS
from tests.ragged.test_nested import LENGTHS, CausalSelfAttention, assert_each, jagged
from tests.ragged.test_unpad import MASKS, Encoder, batch, pooled, real, right

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_masks_of_any_pattern_by_graphs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", dtype)
    exact = copy.deepcopy(model).double()
    ids, mask = (t.cuda() for t in batch(MASKS["right padding"]()))
    fast = burnish.optimize(copy.deepcopy(model), (ids, mask), padding="remove", cache="off")
    assert fast.serving.served[0].padding == "21 of 36 tokens are real"  # type: ignore[attr-defined]
    for _ in range(2):  # captured, and replayed
        for name, make in MASKS.items():
            ids, mask = (t.cuda() for t in batch(make()))
            with torch.no_grad():
                result, eager, true = fast(ids, mask), model(ids, mask), exact(ids, mask)
            if mask.any():
                assert_close(*(real(t, mask) for t in (result, eager, true)))
            assert name == "full rows" or not result[mask == 0].any()


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("name", ANY_MASKS)
def test_tokens_by_the_kernel(name: str, ask: bool) -> None:
    mask = ANY_MASKS[name].cuda()
    true = tokens_of(ANY_MASKS[name], ask, step=128)
    for found in (tokens_of(mask, ask), tokens_of(mask, ask, memory=TokenMemory(mask))):
        assert (found.real, found.contiguous) == (true.real, true.contiguous)
        for part in INPUTS[:-1]:
            assert torch.equal(getattr(found, part).cpu(), getattr(true, part)), part


def test_no_wait_and_one_graph_in_each_call() -> None:
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", torch.float16)
    args = tuple(t.cuda() for t in batch(MASKS["right padding"]()))
    fast = burnish.optimize(model, args, padding="remove", cache="off")
    with torch.no_grad():
        fast(*args)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as trace:
            fast(*args)
    calls = Counter(event.name for event in trace.events() if event.name.startswith("cu"))
    assert calls["cudaGraphLaunch"] == 1, calls
    assert not [name for name in calls if "Synchronize" in name and name != "cudaDeviceSynchronize"], calls
    launches = [name for name in calls if "LaunchKernel" in name or "Memcpy" in name or "Memset" in name]
    assert sum(calls[name] for name in launches) <= 1, calls  # the result's copy


KERNELS = [{"linear": "gluon", "linear_add_layer_norm": name} for name in ("gluon_whole", "gluon_fused")]


@pytest.mark.parametrize("impls", [{}, *KERNELS], ids=["measured", "by our kernels", "fused"])
def test_one_graph_for_all_masks_of_a_shape(impls: dict[str, str]) -> None:
    if impls and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon kernels are for Hopper")
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", torch.float16)
    exact = copy.deepcopy(model).double()
    rows, length = 40, 20
    lengths = torch.randint(0, length + 1, (rows,), generator=torch.Generator().manual_seed(0))
    first = right(lengths, length)
    args = tuple(t.cuda() for t in batch(first))
    # Without verification the kernels that are asked for see no batch that is too small for them.
    fast: Any = burnish.optimize(
        copy.deepcopy(model), args, padding="remove", cache="off", impls=impls, verify=not impls
    )
    assert fast.serving.served[0].padding == f"{int(lengths.sum())} of 800 tokens are real"
    assert fast.serving._prepared[0].packed.of_all_places
    masks = [right(lengths.roll(5), length), right((lengths - 9).clamp(min=0), length).flip(1), torch.ones_like(first)]
    masks += [torch.zeros_like(first), torch.zeros_like(first).index_fill_(1, torch.tensor([3]), 1), first]
    for mask in masks:
        ids, mask = (t.cuda() for t in batch(mask))
        with torch.no_grad():
            result, eager, true = fast(ids, mask), model(ids, mask), exact(ids, mask)
        if mask.any():
            assert_close(*(real(t, mask) for t in (result, eager, true)))
        assert not result[mask == 0].any()
    (entry,) = [e for e in fast._entries.values() if isinstance(e, PackedEntry)]
    assert len([shapes for shapes in entry._all_places if first.shape in shapes]) == 1
    assert entry.tokens == (int(lengths.sum()), 800)


@pytest.mark.parametrize("name", ["gluon", "triton_tma", "triton"])
def test_products_of_as_many_rows_as_the_device_says(name: str) -> None:
    impl = burnish.ops.linear.impls[name]
    rows, columns, depth = 2500, 784, 768
    x, weight = randn(1, rows, depth, dtype=torch.float16, seed=0).cuda(), randn(columns, depth, seed=1) / depth**0.5
    args = burnish.ops.linear.bind(x, weight.half().cuda(), randn(columns, seed=2).half().cuda(), "gelu")
    if impl.why_not(*args) or impl.configs is None:
        pytest.skip("not for this device")
    eager, exact = burnish.ops.linear.reference(*args), oracle(burnish.ops.linear.reference, *args)
    for live in (0, 1, 129, 1800, rows):
        given = x.clone()
        given[:, live:] = float("nan")
        count = torch.tensor([live], dtype=torch.int32, device="cuda")
        for config in impl.configs(*args):
            result = impl.fn(given, *args[1:], config=config, live_rows=count)
            if live:
                assert_close(result[:, :live], eager[:, :live], exact[:, :live])
            torch.cuda.synchronize()


def test_threads_with_streams_of_their_own() -> None:
    """All tokens are found in one place: nobody may write there while another's graph reads."""
    torch.manual_seed(0)
    model = Encoder().eval().to("cuda", torch.float16)
    calls = [tuple(t.cuda() for t in batch(MASKS[name]())) for name in ("right padding", "left padding", "gaps")]
    fast = burnish.optimize(copy.deepcopy(model), calls[0], padding="remove", cache="off")
    with torch.no_grad():
        expected = [fast(*args) for args in calls]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def run(number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                result = fast(*calls[number])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(result, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients() -> None:
    torch.manual_seed(0)
    model = Encoder(pooled).train().to("cuda", torch.bfloat16)
    fast = burnish.optimize(copy.deepcopy(model), padding="remove", cache="off")
    exact = copy.deepcopy(model).double()
    args = tuple(t.cuda() for t in batch(MASKS["right padding"]()))
    found = []
    for _ in range(2):
        fast.zero_grad()
        fast(*args).square().sum().backward()
        found.append([p.grad.clone() for p in fast.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for each in (model, exact):
        each(*args).square().sum().backward()
    assert_close(found[0], *([p.grad for p in each.parameters()] for each in (model, exact)))


@pytest.mark.parametrize("training", [False, True])
def test_nested_in_nested_out(training: bool) -> None:
    torch.manual_seed(0)
    model = CausalSelfAttention().train(training).to("cuda", torch.float16)
    fast = burnish.optimize(copy.deepcopy(model), cache="off")
    for lengths in (LENGTHS, (5, 2), (300, 1, 9)):
        x = jagged(*lengths, dtype=torch.float16).cuda()
        with torch.no_grad():
            result = fast(x)
        assert result.offsets() is x.offsets()
        assert_each(result, model, x)
    assert fast.serving.nested.reasons == []  # type: ignore[attr-defined]
