"""What the backward passes of norms take over from the graph around them in `torch.compile(backend="burnish")`."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from burnish import ops
from burnish.inductor.norms import use_norms
from burnish.lower import op_of
from burnish.numerics import assert_close, randn

pytestmark = pytest.mark.usefixtures("untimed")
BF16 = torch.bfloat16
N = 32
KINDS = pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
PLAIN = {"narrow": None, "dx_sum": False, "normed": None}


@pytest.fixture(autouse=True)
def ours_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norm is differentiated as on a GPU: by its own passes."""
    torch._dynamo.reset()
    monkeypatch.setattr(ops.layer_norm, "training", None)
    module = sys.modules["burnish.ops.layer_norm"]
    ops.layer_norm.differentiate(module._forward, module._backward)


def norms(graph: fx.Graph) -> list[dict[str, Any]]:
    """What each norm's node is asked for."""
    found = []
    for node in graph.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op in (ops.layer_norm_backward, ops.rms_norm_backward):
            kwargs = {name: arg for name, arg in node.kwargs.items() if name != "impl"}
            named = dict(zip(op.signature.parameters, op.bind(*node.args, **kwargs), strict=True))
            found.append({name: named[name] for name in PLAIN})
    return found


def count(graph: fx.Graph, *targets: Any) -> int:
    return sum(node.target in targets for node in graph.nodes)


def norm(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, (N,), weight, bias, eps) if kind == "layer_norm" else ops.rms_norm(x, weight, eps)


def check(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compiled gradients of all inputs, by the rule; half precision is cast to by `fn`, with `like` for the oracle."""
    found = []
    for run, dtype in ((torch.compile(fn, backend="burnish", fullgraph=True), None), (fn, None), (fn, torch.float64)):
        leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in inputs]
        result = run(*leaves)
        (result * randn(*result.shape, seed=99).to(result.dtype)).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert_close(*found)


def half(x: Tensor) -> Tensor:
    """As autocast casts for a product; the oracle stays as it is."""
    return x if x.dtype == torch.float64 else x.bfloat16()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(half(x), half(weight), None if bias is None else half(bias))


def vectors(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(N, dtype=dtype, seed=10 + seed) for seed in range(count)]


def matrices(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(N, N, dtype=dtype, seed=20 + seed) * N**-0.5 for seed in range(count)]


@KINDS
@pytest.mark.parametrize("affine", [True, False])
def test_a_residual_stream_in_float32(graphs: list[fx.Graph], kind: str, affine: bool) -> None:
    def fn(x: Tensor, shift: Tensor, *rest: Tensor) -> Tensor:
        up, up_bias, down, down_bias, w1, b1, w2, b2 = rest
        x = x + shift
        x = x + linear(norm(kind, x, w1 if affine else None, b1 if affine else None), up, up_bias)
        return x + linear(norm(kind, x, w2 if affine else None, b2 if affine else None), down, down_bias)

    up, down = matrices(2)
    shift, up_bias, down_bias, *affines = vectors(7)
    used = affines if affine else []
    given = [randn(3, 5, N), shift, up, up_bias, down, down_bias, *used]
    check(lambda *args: fn(*args, *([None] * (10 - len(args)))) if not affine else fn(*args), *given)
    _, graph = graphs
    # In the order of the backward pass; in front of the first norm is no product, but a bias in float32.
    asked = {"narrow": BF16, "dx_sum": True, "normed": BF16}
    assert norms(graph) == [asked, {**asked, "narrow": None}]
    assert not count(graph, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.rsqrt.default)
    assert count(graph, torch.ops.aten.sum.dim_IntList) == 1, "the last bias's gradient"
    casts = [n for n in graph.nodes if n.target is torch.ops.prims.convert_element_type.default]
    assert not [cast for cast in casts if cast.args[0].target is operator.getitem], "of dx"
    assert not [cast for cast in casts if cast.meta["val"].numel() == N and cast.meta["val"].dtype == BF16], "of sums"


@KINDS
def test_all_in_half_precision(graphs: list[fx.Graph], kind: str) -> None:
    """dx is of the products' dtype as it is, and so is the gradient of the bias."""

    def fn(x: Tensor, first: Tensor, bias: Tensor, second: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(norm(kind, F.linear(x, first, bias), w, b if kind == "layer_norm" else None), second)

    first, second = matrices(2, BF16)
    bias, w, b = vectors(3, BF16)
    check(
        lambda *args: fn(*args, b) if kind == "rms_norm" else fn(*args),
        *(randn(3, 5, N, dtype=BF16), first, bias, second, w, *([b] if kind == "layer_norm" else [])),
    )
    assert norms(graphs[1]) == [{"narrow": None, "dx_sum": True, "normed": BF16}]
    assert not count(graphs[1], torch.ops.aten.sum.dim_IntList, torch.ops.prims.convert_element_type.default)


def trace(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def rewritten(fn: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    """The graph of `fn`, in which all statistics are worked out, after `use_norms`."""
    graph_module = trace(fn, *inputs)
    use_norms(graph_module, {})
    graph_module.graph.lint()
    assert_close(list(graph_module(*inputs)), list(fn(*inputs)), list(fn(*(t.double() for t in inputs))))
    return graph_module.graph


@KINDS
@pytest.mark.parametrize("differ", ["nothing", "x", "weight", "bias", "eps", "no weight", "no bias"])
def test_only_the_very_same_result_is_taken(kind: str, differ: str) -> None:
    def fn(x: Tensor, other: Tensor, grad: Tensor, w: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        given = {"x": x, "weight": w, "bias": b, "eps": 1e-5} | {
            "nothing": {},
            "x": {"x": other},
            "weight": {"weight": v},
            "bias": {"bias": v},
            "eps": {"eps": 1.0},
            "no weight": {"weight": None},
            "no bias": {"bias": None},
        }[differ]
        if kind == "layer_norm":
            product = half(grad).t() @ half(ops.layer_norm.reference(**given))
            return product, ops.layer_norm_backward(grad, x, w, b, 1e-5)[0]
        del given["bias"]
        product = half(grad).t() @ half(ops.rms_norm.reference(**given))
        return product, ops.rms_norm_backward(grad, x, w, 1e-5)[0]

    graph = rewritten(fn, *(randn(15, N, seed=seed) for seed in range(3)), *vectors(3))
    same = differ == "nothing" or ("bias" in differ and kind == "rms_norm")
    assert norms(graph) == [{**PLAIN, "normed": BF16 if same else None}]
    assert same == (not count(graph, torch.ops.aten.rsqrt.default))


@pytest.mark.parametrize(
    "differ", ["nothing", "mean", "correction", "dimension", "all dimensions", "operand", "sign", "power", "rows"]
)
def test_what_only_looks_like_a_norm_is_not_taken(differ: str) -> None:
    def fn(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        dims = {"dimension": 0, "all dimensions": None}.get(differ, 1)
        variance, mean = torch.var_mean(x, dims, correction=int(differ == "correction"), keepdim=True)
        rstd = torch.rsqrt(variance + 1e-5)
        if differ == "mean":
            mean = grad.mean(1, keepdim=True)
        centred = mean - x if differ == "sign" else (grad if differ == "operand" else x) - mean
        product = half(grad).t() @ half(centred * rstd)
        return product, ops.layer_norm_backward(grad, x, None, None, 1e-5)[0]

    def of_squares(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        rstd = torch.rsqrt(
            (x**4 if differ == "power" else x**2).mean(0 if differ == "rows" else 1, keepdim=True) + 1e-5
        )
        operand = grad if differ == "operand" else x
        return half(grad).t() @ half(operand * rstd), ops.rms_norm_backward(grad, x, None, 1e-5)[0]

    both = differ in ("nothing", "operand")
    for each in (fn, of_squares) if both else (of_squares,) if differ in ("power", "rows") else (fn,):
        graph = rewritten(each, randn(N, N), randn(N, N, seed=1))
        assert norms(graph) == [{**PLAIN, "normed": BF16 if differ == "nothing" else None}]


def test_a_result_that_the_gradient_itself_needs_is_worked_out_before(graphs: list[fx.Graph]) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = half(norm("rms_norm", x * x, w, None))
        return torch.bmm(y, y.transpose(1, 2))

    check(fn, randn(3, 5, N), *vectors(1))
    assert norms(graphs[1]) == [PLAIN]


def test_what_pointwise_operators_read_is_left_to_their_kernels(graphs: list[fx.Graph]) -> None:
    def fn(x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return half(norm("rms_norm", (half(x) * half(y)).to(x.dtype), w, None)) * half(z)

    check(fn, randn(15, N), *vectors(1), randn(15, N, seed=1), randn(15, N, seed=2))
    assert norms(graphs[1]) == [PLAIN]


def test_a_result_that_pointwise_operators_read_too_stays() -> None:
    def fn(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        normed = half(ops.rms_norm.reference(x, None, 1e-5))
        return half(grad).t() @ normed, normed * 2, ops.rms_norm_backward(grad, x, None, 1e-5)[0]

    assert norms(rewritten(fn, randn(15, N), randn(15, N, seed=1))) == [PLAIN]


def test_sums_of_half_rows_stay() -> None:
    def fn(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (ops.rms_norm_backward(grad, x, None, 1e-5)[0].view(-1, N // 2).sum(0),)

    assert norms(rewritten(fn, randn(15, N), randn(15, N, seed=1))) == [PLAIN]


def test_sums_over_other_dimensions_stay(graphs: list[fx.Graph]) -> None:
    """As of a table of positions; columns are as many as rows."""

    def fn(x: Tensor, positions: Tensor, texts: Tensor, of_rows: Tensor, w: Tensor) -> Tensor:
        return norm("rms_norm", (x + positions + texts).view(N, N) + of_rows[:, None], w, None)

    check(fn, randn(4, 8, N), randn(8, N, seed=1), randn(4, 1, 1, seed=2), randn(N, seed=3), *vectors(1))
    assert norms(graphs[1]) == [PLAIN]
    torch._dynamo.reset()
    check(
        lambda x, shift, w: norm("rms_norm", (x.t() + shift).t(), w, None), randn(N, N), randn(N, seed=1), *vectors(1)
    )
    assert norms(graphs[3]) == [PLAIN]


def test_random_numbers_are_drawn_in_their_order() -> None:
    def fn(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        product = half(grad).t() @ half(ops.rms_norm.reference(x, None, 1e-5))
        return torch.poisson(product.float().abs()), ops.rms_norm_backward(grad, x, None, 1e-5)[0]

    graph_module = trace(fn, randn(15, N), randn(15, N, seed=1))
    use_norms(graph_module, {})
    assert norms(graph_module.graph) == [PLAIN]


def test_rows_that_are_too_wide_are_asked_for_nothing(graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.inductor.norms._WIDEST", N - 1)

    def fn(x: Tensor, bias: Tensor, w: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return linear(norm("rms_norm", linear(x, first, bias).to(x.dtype) + x, w, None), second)

    check(fn, randn(15, N), *vectors(2), *matrices(2))
    assert norms(graphs[1]) == [PLAIN]


def test_of_any_number_of_rows(graphs: list[fx.Graph]) -> None:
    def fn(x: Tensor, bias: Tensor, w: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return linear(norm("rms_norm", linear(x, first, bias).to(x.dtype) + x, w, None), second)

    for rows in (6, 7, 9):
        check(fn, randn(2, rows, N), *vectors(2), *matrices(2))
    asked = {"narrow": BF16, "dx_sum": True, "normed": BF16}
    assert [norms(graph) for graph in graphs] == [[], [asked], [], [asked]]
