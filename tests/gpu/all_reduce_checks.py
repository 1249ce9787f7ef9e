"""What two GPUs check together: rows summed by the memory that they share, against NCCL's sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import burnish
from burnish import ops
from burnish.numerics import assert_close
from burnish.op import Op
from burnish.parallel import set_up_symmetric_memory, tensor_parallel
from tests.parallel.models import IDS, MODELS, assert_alike
from tests.parallel.ranks import Check

WORLD, WIDTH = "0", 4096
CALLS, REPLAYS, CHAIN = 1000, 200, 16


def arguments(rank: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x of this rank's own; residual and weight alike."""
    own, shared = (torch.Generator("cuda").manual_seed(seed) for seed in (rank, 7))
    x = torch.randn(1, rows, WIDTH, generator=own, device="cuda", dtype=dtype)
    residual = torch.randn(1, rows, WIDTH, generator=shared, device="cuda", dtype=dtype)
    return x, residual, torch.randn(WIDTH, generator=shared, device="cuda", dtype=dtype)


@torch.no_grad()
def sums_are_nccls(rank: int, folder: Path) -> None:
    """In 1000 calls of other rows each, with one GPU late now and then: of two ranks to the bit."""
    assert set_up_symmetric_memory() is None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, residual, weight = arguments(rank, 16, dtype)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for call in range(CALLS):
            rows = 1 + call * 7 % 16
            given = (x[:, :rows] * (1 + call % 5)).contiguous(), None, residual[:, :rows].contiguous(), weight
            if (call + rank) % 9 == 0:
                torch.cuda._sleep(20_000 * (1 + call % 7))
            normed, total = by("symmetric", ops.all_reduce_add_rms_norm, *given)
            nccl_normed, nccl_total = by("torch", ops.all_reduce_add_rms_norm, *given)
            wrong += (total != nccl_total).sum()
            if call % 250 == 0:
                wide = [t.double() for t in (nccl_total, weight)]
                truth = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-6) * wide[1]
                assert_close(normed, nccl_normed, truth)
                assert_alike(normed)
        assert int(wrong) == 0


def by(impl: str, op: Op, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bound = op.bind(*args, group_name=WORLD)
    assert not op.impls[impl].why_not(*bound)
    result: tuple[torch.Tensor, torch.Tensor] = op.impls[impl].fn(*bound)
    return result


@torch.no_grad()
def replays_count_as_calls(rank: int, folder: Path) -> None:
    """A graph of 16 calls in a row, replayed 200 times with other numbers, between calls that no graph has."""
    assert set_up_symmetric_memory() is None
    x, residual, weight = arguments(rank, 3, torch.bfloat16)

    def chain() -> tuple[torch.Tensor, torch.Tensor]:
        branch, total = x, residual
        for _ in range(CHAIN):
            branch, total = by("symmetric", ops.all_reduce_add_rms_norm, branch * (1 + rank), None, total, weight)
        return branch, total

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for replay in range(REPLAYS):
        x.mul_(-1.01)
        graph.replay()
        if replay % 20 == 0:
            eager = chain()
            for mine, expected in zip(captured, eager, strict=True):
                assert torch.equal(mine, expected)
                assert_alike(mine)


@torch.no_grad()
def layer_norm_with_biases(rank: int, folder: Path) -> None:
    assert set_up_symmetric_memory() is None
    x, residual, weight = arguments(rank, 2, torch.float32)
    given = x, weight * 2, residual, weight, weight / 3
    found, expected = (by(impl, ops.all_reduce_add_layer_norm, *given) for impl in ("symmetric", "torch"))
    assert torch.equal(found[1], expected[1])
    truth = torch.nn.functional.layer_norm(expected[1].double(), (WIDTH,), weight.double(), weight.double() / 3)
    assert_close(found[0], expected[0], truth)


def models_generate(rank: int, folder: Path) -> None:
    """The tokens of one process's model, with every sum by shared memory, and with what measures fastest."""
    for name, op in (("llama", "all_reduce_add_rms_norm"), ("gpt2", "all_reduce_add_layer_norm")):
        whole, prompt = MODELS[name]().cuda(), IDS[:, :5].cuda()
        options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for impls in ({op: "symmetric"}, {}):
            model = tensor_parallel(MODELS[name]().cuda())
            fast = burnish.optimize(model, (), {"input_ids": IDS.cuda()}, cache="off", impls=impls)
            assert torch.equal(fast.generate(prompt, **options), expected)
            chosen = {c.impl for served in fast.schedule.served for slot, c in served.choices.items() if op in slot}
            assert chosen == {"symmetric"} if impls else chosen
            dist.barrier()


CHECKS: dict[str, Check] = {
    "sums_are_nccls": sums_are_nccls,
    "replays_count_as_calls": replays_count_as_calls,
    "layer_norm_with_biases": layer_norm_with_biases,
    "models_generate": models_generate,
}
