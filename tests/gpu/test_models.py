"""Whole models on a real device, from one capture, by CUDA graphs: outputs at every shape, and how they run."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import burnish
from burnish import numerics, serving, tuning
from burnish.checks import Checks
from burnish.kernels import warm_up
from burnish.runtime.module import OptimizedModule
from tests import zoo
from tests.e2e.float64 import assert_same_outputs

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def inputs_of(case: zoo.Case, batch: int, seq: int, dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.cuda() for name, value in case.inputs(batch, seq, dtype).items()}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of by a stopwatch, Impls and configs are drawn, Triton's before others: more kernels are run, and no time
    is spent on compiling all of them."""

    def draw(functions: dict[str, Any], arguments: Any, weights: Any) -> dict[str, float]:
        generator = random.Random(repr([getattr(arg, "shape", arg) for arg in arguments[0]]))
        return {name: generator.random() + (1 if name.startswith("triton") else 2) for name in functions}

    monkeypatch.setattr(tuning, "measure_captured", draw)
    monkeypatch.setattr(warm_up, "warm_up", lambda calls: None)
    monkeypatch.setattr(serving, "choose_in_model", lambda *_: None)
    monkeypatch.setattr(Checks, "times", lambda self, entry: {"original": 2.0, "optimized": 1.0})


@pytest.mark.parametrize("short", DTYPES)
@pytest.mark.parametrize("case", zoo.params())
def test_outputs_at_every_shape(case: zoo.Case, short: str) -> None:
    dtype = DTYPES[short]
    model = case.build().to("cuda", dtype)
    fast = burnish.optimize(model, (), inputs_of(case, *case.shapes[0], dtype), cache="off")
    for shape in (*case.shapes, case.shapes[0]):
        assert_same_outputs(fast, model, inputs_of(case, *shape, dtype))
    failures = [unit for found in fast.schedule.verifications for unit in found.failures]
    assert not [(unit.node.name, unit.ops, unit.node.meta["val"].shape, unit.verdict) for unit in failures]
    assert all(served.cuda_graph for served in fast.schedule.served), [s.not_captured for s in fast.schedule.served]


@pytest.fixture
def bert() -> tuple[zoo.Case, torch.nn.Module, OptimizedModule]:
    case = zoo.CASES["bert-sdpa-mask"]
    model = case.build().to("cuda", torch.float16)
    return case, model, burnish.optimize(model, (), inputs_of(case, 2, 16, torch.float16), cache="off")


def outputs(fast: torch.nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.utils._pytree.tree_leaves(fast(**inputs)))


def test_earlier_outputs_stay(bert: tuple[zoo.Case, torch.nn.Module, OptimizedModule]) -> None:
    case, _, fast = bert
    first = inputs_of(case, 2, 16, torch.float16)
    kept = outputs(fast, first)
    before = [t.clone() for t in kept]
    other = {"input_ids": first["input_ids"].flip(0), **{k: v for k, v in first.items() if k != "input_ids"}}
    outputs(fast, other)
    outputs(fast, inputs_of(case, 3, 33, torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_static_outputs_are_overwritten() -> None:
    case = zoo.CASES["bert-sdpa-mask"]
    model = case.build().to("cuda", torch.float16)
    inputs = inputs_of(case, 2, 16, torch.float16)
    fast = burnish.optimize(model, (), inputs, cache="off", static_outputs=True)
    assert [t.data_ptr() for t in outputs(fast, inputs)] == [t.data_ptr() for t in outputs(fast, inputs)]


def test_weights_changed_in_place_or_moved(bert: tuple[zoo.Case, torch.nn.Module, OptimizedModule]) -> None:
    case, model, fast = bert
    inputs = inputs_of(case, 2, 16, torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert_same_outputs(fast, model, inputs)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert_same_outputs(fast, model, inputs)


def test_threads_and_streams(bert: tuple[zoo.Case, torch.nn.Module, OptimizedModule]) -> None:
    case, _, fast = bert
    every = [inputs_of(case, *shape, torch.float16) for shape in ((2, 16), (3, 33), (1, 64), (4, 16))]
    expected = [outputs(fast, inputs) for inputs in every]
    torch.cuda.synchronize()
    faults: list[Any] = []

    def work(turn: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(40):
                    index = (turn + i) % len(every)
                    got = outputs(fast, every[index])
                    torch.cuda.current_stream().synchronize()
                    if not all(torch.equal(a, b) for a, b in zip(got, expected[index], strict=True)):
                        faults.append((turn, i))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_inference_mode_and_back(bert: tuple[zoo.Case, torch.nn.Module, OptimizedModule]) -> None:
    case, _, fast = bert
    inputs = inputs_of(case, 5, 24, torch.float16)
    with torch.inference_mode():
        first = torch.utils._pytree.tree_leaves(fast(**inputs))
    second = outputs(fast, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_flat_over_random_shapes(bert: tuple[zoo.Case, torch.nn.Module, OptimizedModule]) -> None:
    case, model, fast = bert
    fast.serving._graphs.limit = 8
    generator = torch.Generator().manual_seed(0)
    reserved = []
    for _ in range(60):
        batch, seq = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 129))
        inputs = inputs_of(case, batch, seq, torch.float16)
        assert_same_outputs(fast, model, inputs)
        reserved.append(torch.cuda.memory_reserved())
    assert len(fast.serving._graphs) <= 8
    assert reserved[-1] <= 1.3 * reserved[30]


def test_impls_are_tried_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = zoo.CASES["bert-sdpa-mask"]
    model = case.build().to("cuda", torch.float16)
    inputs = inputs_of(case, 4, 64, torch.float16)
    fast = burnish.optimize(model, (), inputs, cache="off")
    assert_same_outputs(fast, model, inputs)
    tried = [choice for choice in fast.schedule.served[0].choices.values() if choice.in_model_us]
    assert tried
    assert all(next(iter(choice.in_model_us)) == choice.candidate for choice in tried)


def test_numbers_of_a_replay_are_those_of_the_calls() -> None:
    case = zoo.CASES["llama-sdpa-mask"]
    model = case.build().to("cuda", torch.bfloat16)
    inputs = inputs_of(case, 2, 16, torch.bfloat16)
    captured = burnish.optimize(model, (), inputs, cache="off")
    plain = burnish.optimize(copy.deepcopy(model), (), inputs, cache="off", cuda_graphs="never")
    oracle = numerics.oracle(copy.deepcopy(model).double(), **inputs)
    leaves = torch.utils._pytree.tree_leaves
    with torch.no_grad():
        reference = leaves(model(**inputs))
        for fast in (captured, plain):
            numerics.assert_close(leaves(fast(**inputs)), reference, leaves(oracle))
