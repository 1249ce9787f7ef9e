"""The sum over the ranks, the residual and the norm behind a divided layer; in a group of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from burnish.lower import Executable
from burnish.numerics import assert_close, oracle
from burnish.parallel import all_reduce
from burnish.parallel.graphs import group_names
from tests.rewrites.conftest import Rewritten, normal

Rewrite = Callable[..., Rewritten]
WORLD, WIDTH = "0", 16


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Whose sum over the ranks is what it has."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    """x, residual, a square weight, and three vectors."""
    shapes = ((2, 5, WIDTH), (2, 5, WIDTH), (WIDTH, WIDTH), *((WIDTH,),) * 3)
    return tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As Llama spells it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def pre_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Any:
    total = all_reduce(F.linear(x, weight), WORLD) + residual
    return rms_norm(total, norm[0]), total


def with_bias(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Any:
    total = residual + (all_reduce(F.linear(x, weight), WORLD) + bias)
    return F.layer_norm(total, (WIDTH,), *norm), total


def post_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.layer_norm(bias + all_reduce(F.linear(x, weight), WORLD) + residual, (WIDTH,), *norm)


@pytest.mark.parametrize(
    ("model", "op", "has_bias", "keep_sum"),
    [
        (pre_norm, "all_reduce_add_rms_norm", False, True),
        (with_bias, "all_reduce_add_layer_norm", True, True),
        (post_norm, "all_reduce_add_layer_norm", True, False),
    ],
)
def test_it_becomes_one_op(
    rewrite: Rewrite, inputs: tuple[Tensor, ...], model: Any, op: str, has_bias: bool, keep_sum: bool
) -> None:
    found = rewrite(model, *inputs)
    assert found.ops == {"linear": 1, op: 1}
    assert "burnish_parallel.all_reduce.default" not in map(str, found.targets)
    call = found.calls[-1]
    assert (call[1] is not None) == has_bias
    assert call[-2:] == (WORLD, keep_sum)
    assert found.fused.matches["all_reduce_add_norm"] == 1
    assert group_names(found.graph) == [WORLD]


def test_it_is_not_left_out_where_nobody_reads_it(rewrite: Rewrite, inputs: tuple[Tensor, ...]) -> None:
    graph = rewrite(pre_norm, *inputs).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ((),)
    graph.eliminate_dead_code()
    assert "burnish.all_reduce_add_rms_norm.default" in [str(node.target) for node in graph.nodes]


def test_a_sum_that_something_else_reads_stays(rewrite: Rewrite, inputs: tuple[Tensor, ...]) -> None:
    def model(x: Tensor, residual: Tensor, weight: Tensor, *vectors: Tensor) -> Any:
        y = all_reduce(F.linear(x, weight), WORLD)
        return rms_norm(y + residual, vectors[0]), y

    found = rewrite(model, *inputs)
    assert found.ops["add_rms_norm"] == 1
    assert "something else reads all_reduce too" in found.reasons


def test_of_two_sums_the_one_that_is_read_once_is_taken(rewrite: Rewrite, inputs: tuple[Tensor, ...]) -> None:
    """As in a model whose embeddings are summed over the ranks: they are the first residual."""

    def model(x: Tensor, residual: Tensor, weight: Tensor, *vectors: Tensor) -> Any:
        embedded = all_reduce(residual, WORLD)
        branch = all_reduce(F.linear(rms_norm(embedded, vectors[0]), weight), WORLD)
        return rms_norm(embedded + branch, vectors[1])

    assert rewrite(model, *inputs).ops == {"rms_norm": 1, "linear": 1, "all_reduce_add_rms_norm": 1}


def test_what_is_no_bias_is_none(rewrite: Rewrite, inputs: tuple[Tensor, ...]) -> None:
    def model(x: Tensor, residual: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        return F.layer_norm(all_reduce(F.linear(x, weight), WORLD) + x + residual, (WIDTH,), *vectors[:2])

    assert rewrite(model, *inputs).ops["add_layer_norm"] == 1


def test_the_product_is_summed_in_its_own_memory(rewrite: Rewrite, inputs: tuple[Tensor, ...]) -> None:
    """Which nothing else reads; but a model's input stays as it is."""

    def of_input(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return rms_norm(all_reduce(x, WORLD) + bias + residual, norm[0])

    for model, in_place in ((post_norm, True), (of_input, False)):
        executable = Executable(rewrite(model, *inputs).program.graph_module)
        slot = executable.slots[-1]
        assert (slot.in_place, executable.donated, executable.borrowed) == (in_place, frozenset(), frozenset())
        torch_impl = slot.op.impls["torch"]
        function = torch_impl.in_place if slot.in_place else torch_impl.fn
        before = [given.clone() for given in inputs]
        with torch.no_grad():
            (result,) = executable.bind({slot.name: function})(executable.read_weights(), list(inputs))  # type: ignore[dict-item]
        assert_close(result, model(*inputs), oracle(model, *inputs))
        assert all(map(torch.equal, before, inputs))
