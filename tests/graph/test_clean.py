"""`clean` removes what provably computes nothing, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn, randn

from burnish.graph import clean, trace

AUTO = torch.export.Dim.AUTO
X = randn(2, 4, 8)


class Function(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        return self.fn(self, x)


def exported(fn: Any, x: Tensor = X, dynamic: bool = False, model: nn.Module | None = None) -> fx.GraphModule:
    sizes = ({0: AUTO, 1: AUTO},) if dynamic else None
    return torch.export.export(model or Function(fn), (x,), strict=False, dynamic_shapes=sizes).module()


def operations(gm: fx.GraphModule) -> list[str]:
    return [
        n.target._schema.name.removeprefix("aten::")
        for n in gm.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    ]


NO_OPS = {
    "dropout in eval": lambda m, x: F.dropout(x.relu(), 0.1, False),
    "dropout of nothing": lambda m, x: F.dropout(x.relu(), 0.0, True),
    "feature dropout": lambda m, x: torch.feature_dropout(x.relu(), 0.1, False),
    "times one": lambda m, x: (x * 1.0 * 1).relu(),
    "over one": lambda m, x: (x / 1.0).relu(),
    "to the same dtype": lambda m, x: x.relu().to(torch.float32),
    "to the same device": lambda m, x: x.relu().to("cpu"),
    "contiguous": lambda m, x: x.relu().contiguous(),
    "view": lambda m, x: x.relu().view(x.shape[0], x.shape[1], 8),
    "reshape": lambda m, x: x.relu().reshape(x.shape),
    "expand": lambda m, x: x.relu().expand(x.shape[0], -1, -1),
    "permute": lambda m, x: x.relu().permute(0, 1, 2),
    "transpose": lambda m, x: x.relu().transpose(1, -2),
    "slice": lambda m, x: x.relu()[:, :, :8],
    "slice to the end": lambda m, x: x.relu()[:, 0:],
    "alias": lambda m, x: torch.ops.aten.alias(x.relu()),
    "detach without gradients": lambda m, x: x.relu().detach(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", NO_OPS)
def test_no_ops_go(case, dynamic):
    gm = exported(NO_OPS[case], dynamic=dynamic)
    clean(gm)
    assert operations(gm) == ["relu"]
    assert torch.equal(gm(X), X.relu())
    if dynamic:
        other = randn(3, 5, 8)
        assert torch.equal(gm(other), other.relu())


SOMETHING = {
    "dropout in training": lambda m, x: F.dropout(x, 0.1, True),
    "to another dtype": lambda m, x: x.to(torch.float64),
    "to a copy": lambda m, x: x.to(torch.float32, copy=True),
    "contiguous of a transposed": lambda m, x: x.transpose(0, 1).contiguous(),
    "channels last": lambda m, x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "view of another shape": lambda m, x: x.view(-1, 8),
    "expand of one": lambda m, x: x.unsqueeze(0).expand(3, -1, -1, -1),
    "permute": lambda m, x: x.permute(1, 0, 2),
    "a real slice": lambda m, x: x[..., :4],
    "every second": lambda m, x: x[..., ::2],
    "clone": lambda m, x: x.clone(),
    "detach of a weight": lambda m, x: x * m.weight.detach(),
    "detach of what needs a weight": lambda m, x: (x * m.weight).detach(),
}


@pytest.mark.parametrize("case", SOMETHING)
def test_what_computes_something_stays(case):
    gm = exported(SOMETHING[case])
    before = operations(gm)
    clean(gm)
    kept = [name for name in before if name != "_assert_tensor_metadata"]
    assert operations(gm) == kept


def test_a_size_that_is_only_equal_by_chance_stays():
    """The example's batch is 2, and so is this constant: for other batches the view is one."""
    gm = trace(lambda x: x.view(2, 4, 8), (X,))
    assert operations(gm) == []
    gm = exported(lambda m, x: x.view(-1, 4, 8), randn(6, 4, 8), dynamic=False)
    clean(gm)
    assert operations(gm) == []
    gm = torch.export.export(
        Function(lambda m, x: x.view(-1, 2, 8)), (X,), strict=False, dynamic_shapes=({0: AUTO},)
    ).module()
    clean(gm)
    assert operations(gm) == ["view"]


def test_checks_go_and_count():
    gm = exported(lambda m, x: x.to(torch.float64).to(torch.float32).relu())
    total = len(gm.graph.nodes)
    removed = clean(gm)
    assert total - removed == len(gm.graph.nodes)
    assert operations(gm) == ["to", "to", "relu"]
    assert not any(n.op == "call_module" for n in gm.graph.nodes)
    assert not hasattr(gm, "_guards_fn")
    assert clean(gm) == 0


def test_repeated_work_is_done_once():
    def model(m, x):
        return (x.relu() * m.weight) + (x.relu() * m.weight).neg()

    gm = exported(model)
    clean(gm)
    assert operations(gm) == ["relu", "mul", "neg", "add"]
    assert [n.op for n in gm.graph.nodes].count("get_attr") <= 1 + 1


def test_repeated_sizes_are_read_once():
    gm = exported(lambda m, x: x.view(x.shape[0], -1) * x.shape[0], dynamic=True)
    clean(gm)
    assert operations(gm).count("sym_size") == 1
    other = randn(5, 3, 8)
    assert torch.equal(gm(other), other.view(5, -1) * 5)


def test_1_and_true_and_1_0_are_different_work():
    gm = exported(lambda m, x: torch.cat([x + 1, x + 1.0, x.sum(-1, keepdim=True) + x], 0))
    clean(gm)
    assert operations(gm).count("add") == 3


def test_random_operations_stay_apart():
    gm = exported(
        lambda m, x: (torch.rand_like(x) - torch.rand_like(x)) + F.dropout(x, 0.5, True) - F.dropout(x, 0.5, True)
    )
    clean(gm)
    assert operations(gm).count("rand_like") == 2
    assert operations(gm).count("dropout") == 2


def test_an_unused_random_operation_stays():
    """It moves the generator on, which the next one sees."""

    def model(m, x):
        torch.rand_like(x)
        x.cos()
        return x + torch.rand_like(x)

    gm = exported(model)
    clean(gm)
    assert operations(gm).count("rand_like") == 2
    assert "cos" not in operations(gm)


def test_reads_around_a_write_stay_apart():
    def model(m, x):
        h = x.sigmoid()
        before = h * 2
        h.add_(1.0)
        return before + h * 2

    gm = exported(model)
    clean(gm)
    assert operations(gm) == ["sigmoid", "mul", "add_", "mul", "add"]
    assert torch.equal(gm(X), X.sigmoid() * 2 + (X.sigmoid() + 1) * 2)


def test_tensors_that_are_written_to_stay_apart():
    def model(m, x):
        a, b = torch.zeros(8), torch.zeros(8)
        a.add_(1.0)
        return x + a - b

    gm = exported(model)
    clean(gm)
    assert operations(gm).count("zeros") == 2
    assert torch.equal(gm(X), X + 1)


def test_writes_to_buffers_stay():
    def model(m, x):
        m.total.add_(x.sum((0, 1)))
        return x.relu()

    gm = exported(model)
    clean(gm)
    gm(X)
    first = gm.total.clone()
    gm(X)
    assert torch.equal(first, X.sum((0, 1)))
    assert torch.equal(gm.total, first + X.sum((0, 1)))


def test_copies_stay_where_they_matter():
    copy = torch.ops.aten._to_copy.default
    gm = exported(lambda m, x: copy(x.relu()).neg())
    clean(gm)
    assert operations(gm) == ["relu", "neg"]
    returned = exported(lambda m, x: copy(x).view(-1))
    clean(returned)
    assert operations(returned) == ["_to_copy", "view"]

    def written_to(m, x):
        h = x.relu()
        return copy(h).add_(1.0) + h

    written = exported(written_to)
    clean(written)
    assert torch.equal(written(X), X.relu() + 1 + X.relu())


def test_two_equal_results_stay_two_tensors():
    gm = exported(lambda m, x: (x.relu(), x.relu()))
    clean(gm)
    first, second = gm(X)
    first.zero_()
    assert torch.equal(second, X.relu())


def test_a_model_with_hugging_face_spelling_keeps_its_result():
    def model(m, x):
        batch, length, width = x.shape
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = (m.weight * h.to(x.dtype)).view(batch, length, 2, width // 2).transpose(1, 2).contiguous()
        h = F.dropout(h, p=0.1, training=False)
        return h.transpose(1, 2).reshape(batch, length, -1).contiguous()

    gm = exported(model, dynamic=True)
    clean(gm)
    assert operations(gm) == [
        "sym_size", "sym_size", "pow", "mean", "add", "rsqrt", "mul", "mul", "view", "transpose", "contiguous",
        "transpose", "reshape",
    ]  # fmt: skip
    other = randn(3, 7, 8)
    assert torch.equal(gm(other), model(Function(model), other))


def test_zero_is_dropped_from_sums_of_integers_only() -> None:
    gm = exported(lambda m, x: ((torch.arange(8) + 0).neg(), (x + 0.0).neg()))
    clean(gm)
    assert operations(gm) == ["arange", "neg", "add", "neg"]


def test_a_product_with_one_that_is_returned_keeps_its_storage() -> None:
    gm = exported(lambda m, x: x * 1.0)
    clean(gm)
    assert operations(gm) == ["mul"]
