"""Every Op in autograd, torch.compile, torch.export and under torch's own checks of operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import burnish
import burnish.ops
from burnish.numerics import assert_close, oracle
from burnish.op import OPS, Op, Sample
from tests.ops.matrix import tensors
from tests.slow import slow

ALL = [OPS[name] for name in burnish.ops.__all__]
NAMES = burnish.ops.__all__
LONG = (
    "linear_rope_append",
    "quantized_gated_product",
    "quantized_linear",
    "quantized_linear_rope_append",
    "varlen_attention_backward",
)  # a fifth of a minute each
WITH_GRADIENT = [OPS[name] for name in NAMES if name != "sample_token"]  # whose result is an index
FEATURES = {  # of each Op, samples that together use every argument
    "add_layer_norm": ("odd", "no sum", "transposed"),
    "add_rms_norm": ("odd", "no sum", "transposed"),
    "all_reduce_add_layer_norm": ("odd", "no sum", "transposed"),
    "all_reduce_add_rms_norm": ("odd", "no sum", "transposed"),
    "attention": (
        *("left padding, causal", "grouped bias", "window", "scale", "grouped decode"),
        "dropout, grouped causal padding",
    ),
    "attention_backward": ("left padding, causal", "grouped bias", "scale", "dropout, grouped causal padding"),
    "attention_backward_packed": (
        *("left padding, causal", "bias", "scale", "grouped causal"),
        "dropout, grouped causal padding",
    ),
    "attention_with_logsumexp": ("left padding, causal", "grouped bias", "scale", "dropout, grouped causal padding"),
    "cached_attention": ("several tokens, window, lengths", "left padding", "scale", "several tokens, bias of each"),
    "cross_entropy": ("every option", "transposed", "none", "smoothed"),
    "cross_entropy_with_gradient": ("every option", "transposed", "a gradient of each loss"),
    "embedding": ("positions", "one token of each text"),
    "embedding_backward": ("words", "odd", "tied"),
    "embedding_layer_norm": ("BERT", "no types"),
    "gate_backward": ("gelu_tanh", "no hidden", "transposed"),
    "gated_mlp": ("gelu_tanh", "biases"),
    "layer_norm_backward": ("odd", "frozen weight", "all results", "transposed"),
    "linear": ("gelu", "residual", "K-major weight"),
    "linear_add_layer_norm": ("biases", "no sum", "plain"),
    "linear_add_rms_norm": ("bias", "no sum", "plain"),
    "linear_cross_entropy": ("every option", "transposed", "none", "bias, sum"),
    "linear_cross_entropy_with_gradients": ("every option", "transposed", "none", "bias, sum"),
    "linear_gelu_backward": ("gelu_tanh", "no hidden", "transposed"),
    "linear_rope": ("head_dim 20", "no bias", "table per row"),
    "linear_rope_append": ("interleaved", "18 rows, partial", "no tables, not all fit"),
    "linear_with_preactivation": ("gelu_tanh", "no bias", "transposed"),
    "quantized_gated_product": ("int8, 16 rows, bias, gelu_tanh", "int4, 64 columns a group, zeros"),
    "quantized_linear": ("int4, bias, silu", "expanded residual", "int4, 64 columns a group, zeros"),
    "quantized_linear_rope_append": ("int8, 16 rows, interleaved, bias", "int4, zeros, 18 rows, partial"),
    "rms_norm_backward": ("odd", "frozen weight", "copies", "sum of rows", "transposed"),
    "rms_norm_gated_mlp": ("5 rows", "transposed"),
    "rms_norm_linear": ("5 rows", "transposed"),
    "rope": ("partial interleaved", "heads last in memory", "table per row"),
    "rope_append": ("partial interleaved", "table and length for each"),
    "rope_qk": ("partial interleaved", "table per row"),
    "scale_gradient": ("one for each row", "transposed"),
    "rope_tables": ("positions for each, scaled", "float positions", "transposed"),
    "varlen_attention": ("causal", "grouped, other keys, causal", "two-sided window"),
    "varlen_attention_backward": (
        "one long sequence",
        "grouped, other keys, gradient of logsumexp",
        "two-sided window",
    ),
    "varlen_attention_with_logsumexp": ("causal", "grouped, other keys", "two-sided window"),
}


def samples(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    found = list(op.samples("cpu", dtype))
    labels = FEATURES.get(op.name, ("odd", "transposed"))
    return [next(s for s in found if s.label == label) for label in labels]


def with_gradients(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for v in values
    )


def gradients(fn: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Gradients of a weighted sum of all results, for every floating input."""
    total = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in tensors(fn(*args)))
    assert isinstance(total, Tensor)
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


class Module(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any) -> Any:
        return self.op(*args)


@pytest.mark.parametrize("op", WITH_GRADIENT, ids=lambda op: op.name)
def test_gradients_of_every_way_to_call(op: Op) -> None:
    for sample in samples(op):
        args = op.bind(*sample.args, **sample.kwargs)
        truth = gradients(op.reference, with_gradients(tuple(_double(a) for a in args)))
        eager = gradients(op.reference, with_gradients(args))
        ways = {"function": op, "overload": op.overload}
        for name, impl in op.impls.items():
            if not impl.why_not(*args):
                ways[name] = op.with_backward(name)
        for name, way in ways.items():
            try:
                assert_close(gradients(way, with_gradients(args)), eager, truth)
            except AssertionError as error:
                raise AssertionError(f"{op.name} by {name} on {sample.label}: {error}") from None


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def int8(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).sub(20).mul(3).to(torch.int8).reshape(shape)


OFFSETS = torch.tensor([0, 3, 4, 4]), torch.tensor([0, 2, 5, 5])  # a query without keys, and an empty sequence

SMALL = {  # float64 inputs small enough for numerical derivatives
    "add_layer_norm": lambda r: (r(2, 5), r(2, 5), r(5), r(5), 1e-2),
    "add_rms_norm": lambda r: (r(2, 5), r(2, 5), r(5), 1e-2),
    "all_reduce_add_layer_norm": lambda r: (r(2, 5), r(5), r(2, 5), r(5), r(5), 1e-2),
    "all_reduce_add_rms_norm": lambda r: (r(2, 5), r(5), r(2, 5), r(5), 1e-2),
    "append_kv": lambda r: (r(2, 1, 4, 2), r(2, 1, 4, 3), r(2, 1, 2, 2), r(2, 1, 2, 3), torch.tensor([1, 3])),
    "attention": lambda r: (
        r(2, 2, 3, 2),
        r(2, 1, 3, 2),
        r(2, 1, 3, 2),
        r(1, 2, 3, 3),
        torch.tensor([[0, 1, 1], [0, 0, 0]]),  # rows that may attend to nothing have no gradient, and no NaN
        True,
    ),
    "attention_backward": lambda r: (
        *(r(2, 2, 3, 2), r(2, 2, 3, 2), r(2, 1, 3, 2), r(2, 1, 3, 2), r(2, 2, 3, 2), r(2, 2, 3), r(1, 2, 1, 3)),
        *(torch.tensor([[0, 1, 1], [0, 0, 0]]), True, None, None, 0.4, torch.tensor([5]), True),
    ),
    "attention_backward_packed": lambda r: (
        *(r(2, 2, 3, 2), r(2, 2, 3, 2), r(2, 1, 3, 2), r(2, 1, 3, 2), r(2, 2, 3, 2), r(2, 2, 3), r(1, 2, 1, 3)),
        *(torch.tensor([[0, 1, 1], [0, 0, 0]]), True, None, None, 0.4, torch.tensor([5])),
    ),
    "attention_with_logsumexp": lambda r: (
        *(r(2, 2, 3, 2), r(2, 1, 3, 2), r(2, 1, 3, 2), r(1, 2, 3, 3), torch.tensor([[1, 1, 0], [1, 1, 1]]), True),
        *(None, None, 0.4, torch.tensor([5])),
    ),
    "embedding": lambda r: (torch.tensor([[0, 2, 2]]), r(3, 4), torch.arange(3)[None], r(3, 4)),
    "embedding_backward": lambda r: (r(1, 3, 4), torch.tensor([[0, 2, 2]]), 3, r(3, 4), r()),
    "embedding_layer_norm": lambda r: (
        torch.tensor([[0, 2, 2]]),
        r(3, 4),
        torch.arange(3)[None],
        r(3, 4),
        torch.tensor([[0, 1, 0]]),
        r(2, 4),
        r(4),
        r(4),
        1e-2,
    ),
    "cached_attention": lambda r: (
        r(1, 2, 2, 3),
        r(1, 1, 5, 3),
        r(1, 1, 5, 3),
        torch.tensor(4),
        None,
        None,
        None,
        r(1, 2, 2, 5),
    ),
    "cross_entropy": lambda r: (r(3, 5), torch.tensor([4, -100, 0]), -100, 0.1, 0.2, 1.5),
    "cross_entropy_with_gradient": lambda r: (r(3, 5), torch.tensor([4, 2, 0]), r(3), 2, 0.1, 0.2, 1.5, "none"),
    "gate": lambda r: (r(2, 6), "silu"),
    "gate_backward": lambda r: (r(2, 3), r(2, 6), "silu"),
    "gated_mlp": lambda r: (r(2, 3), r(4, 3), r(3, 2), r(4), r(3), "gelu"),
    "layer_norm": lambda r: (r(2, 5), r(5), r(5), 1e-2),
    "layer_norm_backward": lambda r: (r(2, 5), r(2, 5), r(5), r(5), 1e-2, r(2, 5), True, True, None, True),
    "linear": lambda r: (r(2, 3), r(4, 3), r(4), "silu", r(2, 4)),
    "linear_add_layer_norm": lambda r: (r(2, 3), r(4, 3), r(4), r(2, 4), r(4), r(4), 1e-2),
    "linear_add_rms_norm": lambda r: (r(2, 3), r(4, 3), r(4), r(2, 4), r(4), 1e-2),
    "linear_cross_entropy": lambda r: (r(3, 2), r(5, 2), torch.tensor([4, -100, 0]), r(5), -100, 0.1, 0.2, 1.5),
    "linear_cross_entropy_with_gradients": lambda r: (
        *(r(3, 2), r(5, 2), torch.tensor([4, 1, 0]), r(5), r(3), 1, 0.1, 0.2, 1.5, "none", True, True, True),
    ),
    "linear_gelu_backward": lambda r: (r(2, 3), r(3, 4), r(2, 4), "gelu"),
    "linear_rope": lambda r: (r(1, 3, 4), r(7, 4), r(7), r(3, 2), r(3, 2), 2, 4),
    "linear_rope_append": lambda r: (
        r(1, 2, 3),
        r(11, 3),
        r(11),
        r(2, 2),
        r(2, 2),
        r(1, 1, 4, 4),
        r(1, 1, 4, 3),
        torch.tensor(1),
        True,
    ),
    "linear_with_preactivation": lambda r: (r(2, 3), r(4, 3), r(4), "gelu"),
    "penalize_repetition": lambda r: (r(2, 5), torch.tensor([[1, 1, 4], [0, 2, 3]]), torch.tensor([3, 2]), 1.3),
    "quantized_gated_product": lambda r: (r(2, 16), int8(4, 16), r(4), None, "int8", r(4), "gelu"),
    "quantized_linear": lambda r: (r(2, 16), int8(3, 16), r(3), None, "int8", r(3), "silu", r(2, 3)),
    "quantized_linear_rope_append": lambda r: (
        *(r(1, 2, 16), int8(11, 16), r(11), None, "int8", r(11)),
        *(r(2, 2), r(2, 2), r(1, 1, 4, 4), r(1, 1, 4, 3), torch.tensor(1), True),
    ),
    "rms_norm": lambda r: (r(2, 5), r(5), 1e-2),
    "rms_norm_backward": lambda r: (r(2, 5), r(2, 5), r(5), 1e-2, r(2, 5), True, None, True),
    "rms_norm_gated_mlp": lambda r: (r(2, 3), r(3), 1e-2, r(4, 3), r(3, 2), r(4), r(3), "gelu"),
    "rms_norm_linear": lambda r: (r(2, 3), r(3), 1e-2, r(4, 3), r(4), "tanh"),
    "rope": lambda r: (r(1, 2, 3, 6), r(3, 4), r(3, 4), True),
    "rope_append": lambda r: (
        r(1, 2, 2, 4),
        r(1, 1, 2, 4),
        r(1, 1, 2, 3),
        r(2, 2),
        r(2, 2),
        r(1, 1, 4, 4),
        r(1, 1, 4, 3),
        torch.tensor(1),
        True,
    ),
    "rope_qk": lambda r: (r(1, 2, 3, 6), r(1, 1, 3, 6), r(3, 4), r(3, 4), True),
    "scale_gradient": lambda r: (r(3, 2), r(3)),
    "rope_tables": lambda r: (r(2, 3), r(4), "float64", 1.5),
    "varlen_attention": lambda r: (r(4, 2, 2), r(5, 1, 2), r(5, 1, 3), *OFFSETS, 3, 3, True),
    "varlen_attention_backward": lambda r: (
        *(r(4, 2, 3), r(4, 2, 2), r(5, 1, 2), r(5, 1, 3), r(4, 2, 3), r(2, 4)),
        *(*OFFSETS, 3, 3, True),
    ),
    "varlen_attention_with_logsumexp": lambda r: (r(4, 2, 2), r(5, 1, 2), r(5, 1, 3), *OFFSETS, 3, 3, False, 2),
}

ONCE = {
    "add_rms_norm": "add_rms_norm",
    "all_reduce_add_rms_norm": "add_rms_norm",
    "cross_entropy": "cross_entropy",
    "linear_add_rms_norm": "add_rms_norm",
    "linear_cross_entropy": "linear_cross_entropy",
}
"""By Op the one, itself or a part of it, that keeps too little for a second derivative, unless its reference is run."""


@pytest.mark.parametrize("op", WITH_GRADIENT, ids=lambda op: op.name)
def test_numerical_derivatives(op: Op) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    args = SMALL[op.name](random)  # type: ignore[no-untyped-call]
    for way in (op, op.overload):
        assert torch.autograd.gradcheck(way, args)
    if op.name not in ONCE:
        assert torch.autograd.gradgradcheck(op.overload, args)
        return
    with pytest.raises(RuntimeError, match=f"`burnish.use\\({ONCE[op.name]}='reference'\\)`"):
        torch.autograd.gradgradcheck(op, args)
    with burnish.use(**{ONCE[op.name]: "reference"}):
        assert torch.autograd.gradgradcheck(op, args)


@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager"])
@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_compile_in_one_graph(op: Op, backend: str) -> None:
    torch._dynamo.reset()
    sample = samples(op)[0]
    args = op.bind(*sample.args, **sample.kwargs)
    compiled = torch.compile(lambda *a: op(*a), backend=backend, fullgraph=True)
    truth = oracle(op.reference, *args)
    assert_close(compiled(*args), op.reference(*args), truth)
    if op not in WITH_GRADIENT:
        return
    tracked = with_gradients(args)
    assert_close(
        gradients(compiled, tracked),
        gradients(op.reference, tracked),
        gradients(op.reference, with_gradients(tuple(_double(a) for a in args))),
    )


@pytest.mark.parametrize("strict", [False, slow(True)], ids=["non-strict", "strict"])
@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_export_as_one_node(op: Op, strict: bool) -> None:
    sample = samples(op)[0]
    args = op.bind(*sample.args, **sample.kwargs)
    program = torch.export.export(Module(op), args, strict=strict)
    operators = [n.target for n in program.graph.nodes if n.op == "call_function" and "burnish" in str(n.target)]
    assert operators == [op.overload]
    assert_close(program.module()(*args), op.reference(*args), oracle(op.reference, *args))


@pytest.mark.parametrize(
    ("name", "make", "dynamic"),
    [
        ("linear", lambda b, s: (torch.randn(b, s, 8), torch.randn(6, 8)), ({0: "b", 1: "s"}, None)),
        ("rms_norm", lambda b, s: (torch.randn(b, s, 8), torch.randn(8)), ({0: "b", 1: "s"}, None)),
        ("layer_norm", lambda b, s: (torch.randn(b, s, 8), torch.randn(8)), ({0: "b", 1: "s"}, None)),
        (
            "add_layer_norm",
            lambda b, s: (torch.randn(b, s, 8), torch.randn(b, s, 8)),
            ({0: "b", 1: "s"}, {0: "b", 1: "s"}),
        ),
        (
            "rope",
            lambda b, s: (torch.randn(b, 2, s, 8), torch.randn(s, 4), torch.randn(s, 4)),
            ({0: "b", 2: "s"}, {0: "s"}, {0: "s"}),
        ),
        (
            "linear_rope",
            lambda b, s: (torch.randn(b, s, 8), torch.randn(9, 8), None, *torch.randn(2, b, s, 4).unbind(), 4, 8),
            ({0: "b", 1: "s"}, None, None, {0: "b", 1: "s"}, {0: "b", 1: "s"}, None, None),
        ),
        (
            "attention",
            lambda b, s: (
                *(torch.randn(b, h, s, 8) for h in (4, 2, 2)),
                torch.randn(1, 4, s, s),
                torch.ones(b, s).long(),
                True,
            ),
            (*({0: "b", 2: "s"},) * 3, {2: "s", 3: "s"}, {0: "b", 1: "s"}, None),
        ),
    ],
)
def test_export_with_dynamic_batch_and_sequence(name: str, make: Any, dynamic: tuple[Any, ...]) -> None:
    op = OPS[name]
    dims = {"b": torch.export.Dim("b"), "s": torch.export.Dim("s")}
    shapes = tuple(None if spec is None else {i: dims[d] for i, d in spec.items()} for spec in dynamic)
    program = torch.export.export(Module(op), make(3, 7), dynamic_shapes=(shapes,), strict=False)
    args = make(2, 33)
    assert_close(program.module()(*args), op.reference(*args), oracle(op.reference, *args))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("op", [slow(op) if op.name in LONG else op for op in ALL], ids=NAMES)
def test_torchs_own_operator_checks(op: Op) -> None:
    for sample in samples(op)[:2]:
        torch.library.opcheck(op.overload, with_gradients(op.bind(*sample.args, **sample.kwargs)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("op", ALL, ids=NAMES)
def test_torchs_own_operator_checks_on_every_sample(op: Op) -> None:
    for sample in op.samples("cpu", torch.float32):
        torch.library.opcheck(op.overload, op.bind(*sample.args, **sample.kwargs))
