"""What two GPUs check together: rows summed by the memory that they share, against NCCL's sums.

From the lowest layer up, so that the first check that does not end, or fails, says which layer it is. Without pytest:
`python -m tests.gpu.all_reduce_checks`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import burnish
from benchmarks.processes import say
from burnish import ops
from burnish.numerics import assert_close
from burnish.op import Op
from burnish.parallel import set_up_symmetric_memory, symmetric, tensor_parallel
from burnish.parallel.graphs import group_of_call
from burnish.runtime.cuda_graph import CapturedCall, GraphPool
from burnish.scheduling import VerificationError
from burnish.tuning import Tuner
from tests.parallel.models import IDS, MODELS, assert_alike
from tests.parallel.ranks import Check, run

WORLD, WIDTH = "0", 4096
CALLS, REPLAYS, CHAIN = 1000, 200, 16
MANY, MANY_CALLS, MANY_REPLAYS, TIMED = 2048, 200, 50, 50
PATIENCE_SECONDS = 20.0
_kept: list[Any] = []  # what is alive when the process group ends


def nccl_sums(rank: int, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.full((16, WIDTH), rank + 1.0, device="cuda", dtype=dtype)
        dist.all_reduce(found)
        finished("NCCL's all-reduce")
        assert bool((found == 3).all())


def memory_is_set_up(rank: int, folder: Path) -> None:
    assert set_up_symmetric_memory() is None
    assert room().rank == rank


@torch.no_grad()
def a_call(rank: int, folder: Path) -> None:
    calls(rank, 1)


@torch.no_grad()
def a_hundred_calls(rank: int, folder: Path) -> None:
    calls(rank, 100)


def calls(rank: int, count: int) -> None:
    x, residual, weight = arguments(rank, 16, torch.bfloat16)
    for _ in range(count):
        normed, total = by("symmetric", ops.all_reduce_add_rms_norm, x, None, residual, weight)
    finished(f"{count} calls of the kernel")
    assert_alike(total)
    assert_alike(normed)


@torch.no_grad()
def a_replay(rank: int, folder: Path) -> None:
    replays(rank, "symmetric")


@torch.no_grad()
def a_replay_of_nccl(rank: int, folder: Path) -> None:
    """Which is kept: `destroy_process_group` waits for ever for a graph that holds NCCL's collectives."""
    replays(rank, "torch")


def replays(rank: int, impl: str) -> None:
    x, residual, weight = arguments(rank, 3, torch.bfloat16)

    def run_it(leaves: Any) -> list[torch.Tensor]:
        return list(by(impl, ops.all_reduce_add_rms_norm, leaves[0], None, residual, weight))

    expected = run_it([x])
    finished(f"a call by {impl}")
    captured = CapturedCall(GraphPool(), run_it, [x], static_outputs=True)
    for _ in range(10):
        found = captured([x])
    finished(f"10 replays by {impl}")
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    _kept.append(captured)


def room() -> symmetric.Room:
    found = symmetric.find(WORLD, torch.device("cuda", torch.cuda.current_device()))
    assert found is not None
    return found


def finished(what: str) -> None:
    """Waits for the device. AssertionError with what has arrived where it does not get there: copies run beside a
    kernel that waits."""
    done, side = torch.cuda.Event(), torch.cuda.Stream()
    done.record()
    ends = time.monotonic() + PATIENCE_SECONDS
    while not done.query():
        if time.monotonic() > ends:
            known = symmetric.find(WORLD, torch.device("cuda", torch.cuda.current_device()))
            arrived = "no memory is shared"
            if known is not None:
                with torch.cuda.stream(side):
                    state, words = known.state.cpu().tolist(), known.words.cpu() >> 32
                arrived = f"[next call, programs in it] is {state}; words of each call that arrived here"
                for half in range(2):
                    for other in range(known.ranks):
                        of_call, count = words[half, other].unique(return_counts=True)
                        arrived += f"; half {half} from {other}: {of_call.tolist()} x {count.tolist()}"
                arrived += "; rows of each call that were pushed here"
                for half in range(2):
                    for other in range(known.ranks - 1):
                        with torch.cuda.stream(side):  # contiguous: a kernel that copies may find no room
                            flags = known.pushed[half, other, : symmetric.MOST_PUSHED_ROWS].cpu()
                        of_call, count = flags.unique(return_counts=True)
                        arrived += f"; half {half} from other {other}: {of_call.tolist()} x {count.tolist()}"
            raise AssertionError(f"{what}: the device is not done after {PATIENCE_SECONDS:.0f} s; {arrived}")
        time.sleep(0.001)


def arguments(
    rank: int, rows: int, dtype: torch.dtype, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x of this rank's own; residual and weight alike."""
    own, shared = (torch.Generator("cuda").manual_seed(seed) for seed in (rank, 7))
    x = torch.randn(1, rows, width, generator=own, device="cuda", dtype=dtype)
    residual = torch.randn(1, rows, width, generator=shared, device="cuda", dtype=dtype)
    return x, residual, torch.randn(width, generator=shared, device="cuda", dtype=dtype)


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
                assert_normed(normed, nccl_normed, nccl_total, weight)
        finished(f"{CALLS} calls")
        assert int(wrong) == 0


def assert_normed(
    normed: torch.Tensor, eager: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> None:
    wide = [t.double() for t in (total, weight)]
    truth = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + eps) * wide[1]
    assert_close(normed, eager, truth)
    assert_alike(normed)


def by(impl: str, op: Op, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bound = op.bind(*args, group_name=WORLD)
    assert not op.impls[impl].why_not(*bound)
    result: tuple[torch.Tensor, torch.Tensor] = op.impls[impl].fn(*bound, **options)
    return result


@torch.no_grad()
def a_call_of_many_rows(rank: int, folder: Path) -> None:
    """And then of others: less than a block of rows, one row more than blocks have, rows that no 16 bytes begin."""
    for rows, width in ((MANY, WIDTH), (1, WIDTH), (MANY - 1, 768), (777, 1030), (300, 33), (13, 8192)):
        x, residual, weight = arguments(rank, rows, torch.bfloat16, width)
        normed, total = by("symmetric_rows", ops.all_reduce_add_rms_norm, x, None, residual, weight)
        finished(f"a call with {rows} rows of {width}")
        nccl_normed, nccl_total = by("torch", ops.all_reduce_add_rms_norm, x, None, residual, weight)
        assert torch.equal(total, nccl_total), (rows, width)
        assert_normed(normed, nccl_normed, nccl_total, weight)


@torch.no_grad()
def many_rows_are_nccls(rank: int, folder: Path) -> None:
    """In 200 calls of other rows each, by every config, in turns with the kernel for few, with one GPU late now and
    then: of two ranks to the bit."""
    impl = ops.all_reduce_add_rms_norm.impls["symmetric_rows"]
    assert impl.configs is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, residual, weight = arguments(rank, MANY, dtype)
        configs = impl.configs(*ops.all_reduce_add_rms_norm.bind(x, None, residual, weight, group_name=WORLD))
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for call in range(MANY_CALLS):
            few = call % 3 == 1
            rows = 1 + call % 16 if few else MANY - call * 37 % 1900 if call % 4 else MANY
            given = x[:, :rows] * (1 + call % 5), None, residual[:, :rows], weight
            if (call + rank) % 9 == 0:
                torch.cuda._sleep(50_000 * (1 + call % 7))
            if few:
                normed, total = by("symmetric", ops.all_reduce_add_rms_norm, *given)
            else:
                config = configs[call % len(configs)]
                normed, total = by("symmetric_rows", ops.all_reduce_add_rms_norm, *given, config=config)
            if call % 5 == 0:  # otherwise NCCL would keep the GPUs together
                nccl_normed, nccl_total = by("torch", ops.all_reduce_add_rms_norm, *given)
                wrong += (total != nccl_total).sum()
            if call % 80 == 0:
                finished(f"{call + 1} calls in {dtype}")
                assert_normed(normed, nccl_normed, nccl_total, weight)
        finished(f"{MANY_CALLS} calls in {dtype}")
        assert int(wrong) == 0, dtype


@torch.no_grad()
def many_rows_one_after_another(rank: int, folder: Path) -> None:
    """200 calls with nothing in between that would keep the GPUs together; each sum is what the next call adds up, so
    one row that was read too early, or overwritten, shows in the end."""
    x, residual, _ = arguments(rank, MANY, torch.float32, 1024)
    x, residual = (4 * x).round(), (4 * residual).round()  # whole numbers: sums are exact in any order
    total, expected = residual, residual.double()
    summed = x.double()
    dist.all_reduce(summed)
    for call in range(MANY_CALLS):
        if call % 20 == 10 * rank:
            torch.cuda._sleep(200_000)
        factor = 1 + call % 7
        _, total = by("symmetric_rows", ops.all_reduce_add_rms_norm, x * factor, None, total)
        expected = expected + summed * factor
    finished(f"{MANY_CALLS} calls one after another")
    assert torch.equal(total.double(), expected)


@torch.no_grad()
def layer_norm_of_many_rows(rank: int, folder: Path) -> None:
    x, residual, weight = arguments(rank, 777, torch.float16, 1600)
    given = x, weight * 2, residual, weight, weight / 3
    found, expected = (by(impl, ops.all_reduce_add_layer_norm, *given) for impl in ("symmetric_rows", "torch"))
    finished("layer normalization of many rows")
    assert torch.equal(found[1], expected[1])
    truth = torch.nn.functional.layer_norm(expected[1].double(), (1600,), weight.double(), (weight / 3).double())
    assert_close(found[0], expected[0], truth)


@torch.no_grad()
def many_rows_timed(rank: int, folder: Path) -> None:
    """Nothing is asserted: what 2048 rows of 4096 take by NCCL and the norm, and by each config of one kernel."""
    op = ops.all_reduce_add_rms_norm
    x, residual, weight = arguments(rank, MANY, torch.bfloat16)
    bound = op.bind(x, None, residual, weight, group_name=WORLD)
    runs: dict[str, Any] = {}
    for name in ("torch_triton", "symmetric_rows"):
        impl = op.impls[name]
        assert impl.configs is not None
        for config in impl.configs(*bound)[: None if name == "symmetric_rows" else 1]:
            runs[f"{name} {config}"] = partial(impl.in_place or impl.fn, *bound, config=config)
    for name, run_it in runs.items():
        for _ in range(5):
            run_it()
        finished(name)
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED):
            run_it()
        end.record()
        finished(f"{TIMED} calls by {name}")
        say(f"rank {rank}", f"{MANY} x {WIDTH} bfloat16 by {name}: {start.elapsed_time(end) * 1e3 / TIMED:.1f} us")


def replays_count_as_calls(rank: int, folder: Path) -> None:
    """A graph of 16 calls in a row, replayed 200 times with other numbers, between calls that no graph has."""
    replays_count(rank, "symmetric", 3, REPLAYS)


def replays_of_many_rows(rank: int, folder: Path) -> None:
    replays_count(rank, "symmetric_rows", MANY, MANY_REPLAYS)


@torch.no_grad()
def replays_count(rank: int, impl: str, rows: int, replays: int) -> None:
    assert set_up_symmetric_memory() is None
    x, residual, weight = arguments(rank, rows, torch.bfloat16)

    def chain() -> tuple[torch.Tensor, torch.Tensor]:
        branch, total = x, residual
        for _ in range(CHAIN):
            branch, total = by(impl, ops.all_reduce_add_rms_norm, branch * (1 + rank), None, total, weight)
        return branch, total

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for replay in range(replays):
        x.mul_(-1.01)
        graph.replay()
        if replay % 20 == 0:
            finished(f"{replay + 1} replays")
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


def generates(name: str, op: str, impls: dict[str, str], rank: int, folder: Path) -> None:
    """The tokens of one process's model, with every sum by shared memory, or with what measures fastest."""
    whole, prompt = MODELS[name]().cuda(), IDS[:, :5].cuda()
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = whole.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with only_exchanges_measured():
        model = tensor_parallel(MODELS[name]().cuda())
        fast = burnish.optimize(model, (), {"input_ids": IDS.cuda()}, cache="off", impls=impls)
        assert torch.equal(fast.generate(prompt, **options), expected)
    chosen = {c.impl for served in fast.schedule.served for slot, c in served.choices.items() if op in slot}
    assert chosen == set(impls.values()) if impls else chosen
    _kept.append(fast)


def mlp_of_the_tutorial(rank: int, folder: Path) -> None:
    """As in docs/tutorial-parallel.md, with NCCL in the place of gloo."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).cuda()
    sch = burnish.create_schedule(mlp, (torch.randn(4, 16, 256).cuda(),))
    for name, parameter, axis in (("0", "weight", 0), ("0", "bias", 0), ("2", "weight", 1)):
        sch[name].shard(parameter, axis=axis)
    sch["0"].sync("bwd_post", "all_reduce")
    with pytest.raises(
        VerificationError, match=r"step 3, shard in 2: a sync is missing: 2: .*'fwd_post', 'all_reduce'"
    ):
        sch.verify()
    sch["2"].sync("fwd_post", "all_reduce")
    sch.verify()
    assert "1 output and 4 gradients on 3 inputs in train mode" in sch.history[-1].numerics[0]
    assert sch.build()[2].weight.shape == (256, 512)


@contextmanager
def only_exchanges_measured() -> Iterator[None]:
    """To compile and measure all else in every config takes minutes, and is checked elsewhere."""
    choose = Tuner.choose

    def cheaply(self: Tuner, op: Op, args: Any, *, budget_us: float, **options: Any) -> Any:
        return choose(self, op, args, budget_us=budget_us if group_of_call(op, args) else 0.0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "choose", cheaply)
        yield


RMS, LAYER = "all_reduce_add_rms_norm", "all_reduce_add_layer_norm"
CHECKS: dict[str, Check] = {
    "nccl_sums": nccl_sums,
    "memory_is_set_up": memory_is_set_up,
    "a_call": a_call,
    "a_hundred_calls": a_hundred_calls,
    "a_replay": a_replay,
    "a_replay_of_nccl": a_replay_of_nccl,
    "sums_are_nccls": sums_are_nccls,
    "replays_count_as_calls": replays_count_as_calls,
    "layer_norm_with_biases": layer_norm_with_biases,
    "a_call_of_many_rows": a_call_of_many_rows,
    "layer_norm_of_many_rows": layer_norm_of_many_rows,
    "many_rows_one_after_another": many_rows_one_after_another,
    "many_rows_are_nccls": many_rows_are_nccls,
    "replays_of_many_rows": replays_of_many_rows,
    "many_rows_timed": many_rows_timed,
    "mlp_of_the_tutorial": mlp_of_the_tutorial,
    "llama_by_shared_memory": partial(generates, "llama", RMS, {RMS: "symmetric"}),
    "llama_by_pushed_rows": partial(generates, "llama", RMS, {RMS: "symmetric_rows"}),
    "llama_by_what_is_fastest": partial(generates, "llama", RMS, {}),
    "gpt2_by_shared_memory": partial(generates, "gpt2", LAYER, {LAYER: "symmetric"}),
    "gpt2_by_what_is_fastest": partial(generates, "gpt2", LAYER, {}),
}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as shared:
        wrong = run("tests.gpu.all_reduce_checks", "CHECKS", Path(shared), "nccl", seconds=60)
    for check, error in wrong:
        print(f"{check}: {error}")
    sys.exit(bool(wrong))
