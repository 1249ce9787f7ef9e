"""Weights that a fused Op wants together become one tensor, of which the original parameters become views.

So memory does not grow, `load_state_dict` and in-place updates reach the packed tensor, and nothing has to be packed
again. On the CPU a weight may also be stored (K, N) instead of (N, K), where that measures faster: oneDNN then reads it
in place (measured on Zen 4, 128 x 384 x 1536: 721 us against 741 as stored by PyTorch; on Zen 5 the gap is wider), and
a parameter stays a (N, K) view. On CUDA it is the other way round: the kernels read rows of (N, K), so what a model
stores (K, N), as GPT-2's Conv1D does, is stored (N, K), of which the parameter is a view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from burnish.lower import op_of
from burnish.record import NearMiss, StepRecord, together

aten = torch.ops.aten
_TOGETHER = "weights packed together"


@dataclass(frozen=True)
class Member:
    """One original weight inside a packed one: `path` in the model, rows `start:stop` of the packed tensor."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Pack:
    """One packed weight: the buffer's name on the graph module, its members, and whether it is stored (K, N)."""

    name: str
    members: tuple[Member, ...]
    transposed: bool


def pack(
    graph_module: fx.GraphModule,
    model: nn.Module,
    wants_transposed: Callable[[fx.Node], bool],
    keeps_layout: bool = False,
) -> tuple[list[Pack], StepRecord]:
    """Replaces every `cat` of weights by one packed weight, and stores (K, N) the weights for which `wants_transposed`
    says so.

    Args:
        model: owner of the parameters; their `.data` become views.
        keeps_layout: store no parameter (N, K) that is stored (K, N).
        wants_transposed: asked once for each node that stands for a whole weight matrix which only products read.
    """
    started = time.perf_counter()
    record = StepRecord("pack", nodes_before=len(graph_module.graph.nodes))
    stored = 0 if keeps_layout else _store_rows(graph_module, model)
    packs: list[Pack] = []
    misses: list[NearMiss] = []
    done: dict[tuple[str, ...], fx.Node] = {}
    weights = [node for node in graph_module.graph.nodes if _is_weight(node)]
    cats = [node for node in graph_module.graph.nodes if node.target is aten.cat.default and _is_cat_of_weights(node)]
    cats.sort(key=lambda cat: -len(_parts(cat)))  # the widest first: it holds what a narrower one wants
    replaced = 0
    for node in (*cats, *weights):
        parts = _parts(node)
        transposed = _is_matrix(node) and _only_products_read(node) and wants_transposed(node)
        if not transposed and node.op == "get_attr":
            continue
        key = tuple(str(part.target) for part in parts)
        if key not in done:
            reason = _cannot_pack(model, parts)
            if reason is not None:
                misses.append(NearMiss(_TOGETHER, reason, (node.name,)))
                continue
            taken = {member.path for earlier in packs for member in earlier.members}
            packed, members = _pack_tensors(model, parts, transposed, taken)
            if packed is None:
                misses.append(NearMiss(_TOGETHER, "a weight is packed with others already", (node.name,)))
                continue
            name = f"_packed_{len(packs)}"
            graph_module.register_buffer(name, packed, persistent=False)
            packs.append(Pack(name, members, transposed))
            with graph_module.graph.inserting_before(node):
                done[key] = graph_module.graph.get_attr(name)
            done[key].meta = {name: entry for name, entry in node.meta.items() if name != "origin"}
        elif list(graph_module.graph.nodes).index(done[key]) > list(graph_module.graph.nodes).index(node):
            node.prepend(done[key])
        node.replace_all_uses_with(done[key])
        replaced += node.op != "get_attr"
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    record.matches = {_TOGETHER: replaced, "stored (K, N)": sum(p.transposed for p in packs)}
    record.matches |= {"stored (N, K)": stored} if stored else {}
    record.near_misses = together(misses)
    record.nodes_after = len(graph_module.graph.nodes)
    record.seconds = time.perf_counter() - started
    return packs, record


def _store_rows(graph_module: fx.GraphModule, model: nn.Module) -> int:
    """Stores (N, K) the parameters (K, N) that nothing but products on CUDA read, transposed. Returns how many."""
    stored = 0
    for node in graph_module.graph.nodes:
        if not _is_weight(node) or not node.meta["val"].is_cuda or not _read_transposed(node):
            continue
        weight = _tensor(model, node)
        if weight is not None and type(weight) is nn.Parameter and weight.is_contiguous():
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.data.t().contiguous().t()
            stored += 1
    return stored


def _read_transposed(node: fx.Node) -> bool:
    """Whether every reader of the weight is a transpose, whose readers are Ops that multiply by it."""
    others = (other for other in node.graph.nodes if other.op == "get_attr" and other.target == node.target)
    readers = [user for other in others for user in other.users]
    return bool(readers) and all(
        reader.target is aten.t.default and all(_multiplies(user, reader) for user in reader.users)
        for reader in readers
    )


def _multiplies(node: fx.Node, weight: fx.Node) -> bool:
    op = op_of(node.target)
    return op is not None and any(op.bind(*node.args, **node.kwargs)[i] is weight for i in op.weights)


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)


def _is_cat_of_weights(node: fx.Node) -> bool:
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts: Any = node.args[0]
    return dim == 0 and all(_is_weight(part) or part.target is aten.new_zeros.default for part in parts)


def _parts(node: fx.Node) -> list[fx.Node]:
    return [node] if node.op == "get_attr" else list(node.args[0])  # type: ignore[arg-type]


def _is_matrix(node: fx.Node) -> bool:
    return bool(node.meta["val"].dim() == 2)


def _only_products_read(node: fx.Node) -> bool:
    """Whether every reader of the weight (or of the weights in a cat) is a product. An embedding that shares it would
    suffer."""
    paths = {part.target for part in _parts(node)}
    readers = [
        user for other in node.graph.nodes if other.op == "get_attr" and other.target in paths for user in other.users
    ]
    readers += [user for user in node.users if node.op != "get_attr"]
    products = {torch.ops.burnish.linear.default, torch.ops.burnish.gated_mlp.default}
    return all(reader is node or reader.target in products for reader in readers)


def _cannot_pack(model: nn.Module, parts: Sequence[fx.Node]) -> str | None:
    tensors = [tensor for part in parts if (tensor := _tensor(model, part)) is not None]
    paths = [part.target for part in parts if part.op == "get_attr"]
    if len(tensors) != len(paths):
        return "a weight is not a parameter of the model"
    if len(set(map(id, tensors))) != len(tensors):
        return "one weight stands in several places"
    if len({(t.dtype, t.device, t.shape[1:]) for t in tensors}) != 1:
        return "the weights differ in dtype, device or width"
    if any(type(t) not in (nn.Parameter, Tensor) or not t.is_leaf for t in tensors):
        return "a weight is not a plain tensor"
    return None


def _tensor(model: nn.Module, part: fx.Node) -> Tensor | None:
    if part.op != "get_attr":
        return None
    try:
        return model.get_parameter(str(part.target))
    except AttributeError:
        return None


def _pack_tensors(
    model: nn.Module, parts: Sequence[fx.Node], transposed: bool, taken: set[str]
) -> tuple[Tensor | None, tuple[Member, ...]]:
    """The packed tensor, with the parameters made views of it. A packing that is there already is found and kept; None
    where another one would be torn apart, one that has a path in `taken`."""
    tensors = [_tensor(model, part) for part in parts]
    rows = [part.meta["val"].shape[0] for part in parts]
    starts = [sum(rows[:i]) for i in range(len(rows))]
    members = tuple(
        Member(str(part.target), start, start + count)
        for part, start, count, tensor in zip(parts, starts, rows, tensors, strict=True)
        if tensor is not None
    )
    present = [t for t in tensors if t is not None]
    packed = _existing(present, members, sum(rows), transposed)
    if packed is None and len(present) > 1:
        # The other way round is good enough: moving them would unsettle whoever packed them.
        packed = _existing(present, members, sum(rows), not transposed)
    if packed is None and taken.isdisjoint(member.path for member in members):
        # Made in inference mode, the parameters would be of no use to autograd ever after.
        with torch.inference_mode(False), torch.no_grad():
            packed = _allocate(present[0], sum(rows), transposed)
            if len(present) < len(parts):
                packed.zero_()
            for tensor, member in zip(present, members, strict=True):
                packed[member.start : member.stop].copy_(tensor)
                tensor.data = packed[member.start : member.stop]
    return packed, members


def _allocate(like: Tensor, rows: int, transposed: bool) -> Tensor:
    if transposed:
        return torch.empty((like.shape[1], rows), dtype=like.dtype, device=like.device).t()
    return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device=like.device)


def _existing(tensors: Sequence[Tensor], members: Sequence[Member], rows: int, transposed: bool) -> Tensor | None:
    """The packed tensor that these parameters are views of already, after an earlier `optimize` of the same model."""
    first = tensors[0].detach()
    shape = (rows, *first.shape[1:])
    stride = ((1, rows) if transposed else (first[0].numel(), 1))[: first.dim()] if first.dim() == 2 else (1,)
    start = first.storage_offset() - members[0].start * stride[0]
    needed = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    if start < 0 or first.untyped_storage().nbytes() < needed * first.element_size():
        return None
    packed = first.as_strided(shape, stride, start)
    for tensor, member in zip(tensors, members, strict=True):
        part = packed[member.start : member.stop]
        if tensor.data_ptr() != part.data_ptr() or tensor.stride() != part.stride():
            return None
    return packed
