"""Spellings of cross entropy -> the Op, of the logits as the model made them.

Between a model's product and its loss stand views ((B, T, V) to (B * T, V)), a shift by one token, copies, and a cast
to float32, which Hugging Face and autocast make of half-precision logits. The Op computes in float32 anyway, so the
cast goes; so does a cap (Gemma 2) that is the loss's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.ops._common import HALF_TYPES, wide
from burnish.rewrites.rewrite import GraphPass, Outcome, Rewrite, arguments, insert, same, value

aten = torch.ops.aten

_REDUCTIONS = ("none", "mean", "sum")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.contiguous.default, aten.clone.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)
_LOG_SOFTMAXES = (aten.log_softmax.int, aten._log_softmax.default)
_NLL_LOSSES = (aten.nll_loss_nd.default, aten.nll_loss.default)


@dataclass(frozen=True)
class Path:
    """How rows of `source` come to where they are used: `steps` takes some, or orders them otherwise, and changes none.

    Of these steps those that are casts to float32 have been left out.
    """

    source: fx.Node
    steps: tuple[fx.Node, ...]
    widened: bool

    def follow(self, rows: fx.Proxy, width: Any = None) -> Any:
        """The steps, made with the proxy of other rows, of `width` entries if that differs."""
        tracer = rows.tracer
        as_proxy: Any = lambda node: fx.Proxy(node, tracer)  # noqa: E731
        for step in self.steps:
            args: Any = fx.node.map_arg(arguments(step), as_proxy)
            if step.target in _VIEWS:
                # Not a view: what is viewed may not be as contiguous as what was.
                sizes = args["shape"] if "shape" in args else args["size"]
                rows = aten.reshape.default(rows, [*sizes] if width is None else [*sizes[:-1], width])
            elif step.target is aten.flatten.using_ints:
                rows = aten.flatten.using_ints(rows, args["start_dim"], args["end_dim"])
            elif step.target is aten.slice.Tensor:
                rows = aten.slice.Tensor(rows, *(args[name] for name in ("dim", "start", "end", "step")))
        return rows


def path_of_rows(node: fx.Node, alone: bool = False) -> Path:
    """From `node` upwards as far as rows are only chosen, arranged, copied or widened; `alone`: by nodes that nothing
    else reads."""
    steps: list[fx.Node] = []
    widened = False
    while not alone or len(node.users) == 1:
        if _widens(node):
            widened = True
        elif not (node.target in _COPIES or _arranges_rows(node)):
            break
        if not _widens(node):
            steps.append(node)
        (node,) = node.all_input_nodes[:1]
    return Path(node, tuple(reversed(steps)), widened)


def _arranges_rows(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.dim() or not after.dim():
        return False
    if node.target in _VIEWS or node.target is aten.flatten.using_ints:
        return same(before.shape[-1], after.shape[-1])
    return node.target is aten.slice.Tensor and arguments(node)["dim"] % before.dim() < before.dim() - 1


def _widens(node: fx.Node) -> bool:
    """Whether this is a cast of half precision to float32."""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = value(node.args[0]), value(node)
    return before.dtype in HALF_TYPES and after.dtype == torch.float32 and before.device == after.device


def raise_cross_entropy(graph_module: fx.GraphModule) -> Outcome:
    """`cross_entropy_loss(logits, target)`, and `nll_loss(log_softmax(logits), target)`."""
    count, refused = 0, []
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.cross_entropy_loss.default and node.target not in _NLL_LOSSES:
            continue
        if reason := _raise(graph_module, node):
            refused.append(f"{node.name}: {reason}")
        else:
            count += 1
    return Outcome(count, tuple(refused))


def _raise(graph_module: fx.GraphModule, node: fx.Node) -> str | None:
    args = arguments(node)
    if reason := _refuse(node, args):
        return reason
    logits = args["self"]
    target = args["target"]
    reduction = _REDUCTIONS[args["reduction"]]
    flat = value(logits).dim() == 3
    if flat:  # (N, C, L): the classes are not last
        logits = logits.args[0]
    path = path_of_rows(logits)
    if node.target in _NLL_LOSSES:
        softmax = path.source
        if softmax.target not in _LOG_SOFTMAXES or path.widened:
            return "its input is not a log_softmax's result"
        if arguments(softmax)["dim"] % value(softmax).dim() != value(softmax).dim() - 1:
            return f"{softmax.name} is not over the last dimension"
        if others := _other_users(softmax, path.steps, node):
            return f"{softmax.name} is also used by {others}"
        above = path_of_rows(arguments(softmax)["self"])
        path = Path(above.source, above.steps + path.steps, above.widened)
    softcap = None
    if capped := _cap_of(path.source):
        inner, softcap = capped
        above = path_of_rows(inner)
        path = Path(above.source, above.steps + path.steps, above.widened or path.widened)
    dtype = value(node).dtype
    numbers = args["ignore_index"], args.get("label_smoothing", 0.0)

    def build(source: Any, target: Any) -> Any:
        rows = path.follow(source)
        if flat:
            rows, target = aten.flatten.using_ints(rows, 0, 1), aten.flatten.using_ints(target)
        loss = ops.cross_entropy(rows, target, *numbers, 0.0, softcap, reduction)
        return loss if dtype == wide(value(path.source).dtype) else aten.to.dtype(loss, dtype)

    return insert(graph_module, [node], build, path.source, target)


def _refuse(node: fx.Node, args: dict[str, Any]) -> str | None:
    logits, target = value(args["self"]), value(args["target"])
    if args["weight"] is not None:
        return "it weighs the classes"
    if target.is_floating_point():
        return "its targets are probabilities, not classes"
    if target.dtype != torch.int64:
        return f"its targets are {target.dtype}, not torch.int64"
    if not isinstance(args["ignore_index"], int):
        return "ignore_index is not a constant"
    if logits.dim() == 2:
        return None
    if logits.dim() == 3 and _swaps_last_dims(args["self"]) and node.target is aten.cross_entropy_loss.default:
        return "it gives a loss for each token of (B, T)" if args["reduction"] == 0 else None
    return f"logits of shape {tuple(logits.shape)} are not (T, V), nor such with their last dimensions swapped"


def _swaps_last_dims(node: fx.Node) -> bool:
    args = arguments(node) if node.target in (aten.transpose.int, aten.permute.default) else {}
    dims = args.get("dims")
    return dims in ([0, 2, 1], [0, -1, -2], [0, -1, 1]) or {args.get("dim0", 0) % 3, args.get("dim1", 0) % 3} == {1, 2}


def _other_users(softmax: fx.Node, steps: tuple[fx.Node, ...], node: fx.Node) -> str:
    """Who else reads the probabilities, on their way to the loss."""
    expected = {*steps, node}
    return ", ".join(user.name for step in (softmax, *steps) for user in step.users if user not in expected)


def _cap_of(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Of `c * tanh(x / c)`, whose steps nothing else reads: x and c."""
    scaled = _times(node)
    if scaled is None or len(node.users) != 1:
        return None
    tanh, cap = scaled
    if tanh.target is not aten.tanh.default or len(tanh.users) != 1 or not cap > 0:
        return None
    inner = tanh.args[0]
    if not isinstance(inner, fx.Node) or len(inner.users) != 1:
        return None
    if inner.target is aten.div.Tensor and inner.args[1] == cap and isinstance(inner.args[0], fx.Node):
        return inner.args[0], cap
    shrunk = _times(inner)
    return (shrunk[0], cap) if shrunk is not None and shrunk[1] == 1 / cap else None


def _times(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Of a product with a number: the other factor and the number."""
    if node.target is not aten.mul.Tensor:
        return None
    for one, other in (node.args, node.args[::-1]):
        if isinstance(one, fx.Node) and isinstance(other, (int, float)):
            return one, float(other)
    return None


CROSS_ENTROPY: list[Rewrite | GraphPass] = [GraphPass("cross_entropy", raise_cross_entropy)]
