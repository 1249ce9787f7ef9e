"""Products of float weights -> products of quantized copies, and the captured graph that these are verified against.

This step changes what a model computes, as no other does. So it also says what is right from now on: the captured graph
with every quantized weight replaced by its dequantized value. Whatever a kernel gets wrong shows against that graph;
what quantization itself changes is the difference between that graph and the one that was captured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from burnish import ops
from burnish.capture import copy_graph
from burnish.lower import op_of
from burnish.op import Op
from burnish.quantize import Kind, QuantizedWeight, dequantize_rows
from burnish.quantized_weights import Part, Quantization, QuantizedWeights
from burnish.record import StepRecord
from burnish.rewrites.rewrite import GraphPass, Outcome, apply, arguments, insert, set_value, value

aten = torch.ops.aten

MIN_ENTRIES = 1 << 16  # of a weight; smaller ones are read in less time than a kernel takes to start
_COLUMNS = {"int8": 16, "fp8": 16, "int4": 128}  # so many are stored together
_PRODUCTS: dict[Any, Op] = {op.overload: op for op in (ops.linear, ops.linear_rope_append, ops.gated_mlp)}
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_LOOKED_UP = (aten.embedding.default, ops.embedding_layer_norm.overload)

# Passes of FUSE that put a norm into a product, or a rotation and no append, which no quantized product has: they run
# afterwards, on what has stayed float.
OF_FLOAT_PRODUCTS = ("linear_add_norm", "linear_rope", "norm prologue")


@dataclass(eq=False)
class _Product:
    """A product that may be quantized: its node, the parts of each of its weights, and the kind."""

    node: fx.Node
    weights: list[tuple[Part, ...]]
    kind: Kind

    @property
    def paths(self) -> set[str]:
        return {part.path for parts in self.weights for part in parts}


@dataclass(frozen=True)
class _Stored:
    """Where the graph module has a quantized weight: its buffers by name."""

    weight: QuantizedWeight
    data: str
    scales: str


def quantize(
    graph_module: fx.GraphModule, captured: fx.GraphModule, weights: QuantizedWeights, kind: Kind
) -> tuple[Quantization, fx.GraphModule, StepRecord]:
    """Puts quantized products where float ones of large weights are, with their bias, activation and residual.

    `linear` becomes `quantized_linear`, `linear_rope_append` `quantized_linear_rope_append`, and `gated_mlp` a
    `quantized_gated_product` and a `quantized_linear`. Products that were merged (q, k and v) stay one, of copies whose
    rows follow each other. An embedding keeps its float weight, also where a product shares it. Of "int4" the head (the
    product that widens, after which there is none) is int8: it decides between tokens, and is usually left at a higher
    precision.

    A weight stays float with fewer than `MIN_ENTRIES` entries, with K no multiple of 16 (of int4 128), with entries
    that are not finite, or where something else than products and embeddings reads it.

    Returns what was done, the captured graph on dequantized weights, and the record.
    """
    started = time.perf_counter()
    step = _Step(graph_module, weights, kind)
    record = apply("quantize", [GraphPass(kind, step.run)], graph_module)
    expected = step.on_dequantized(captured)
    done = step.summary()
    record.numerics.append(str(done))
    record.seconds = time.perf_counter() - started
    return done, expected, record


class _Step:
    def __init__(self, graph_module: fx.GraphModule, weights: QuantizedWeights, kind: Kind) -> None:
        self.graph_module, self.weights, self.kind = graph_module, weights, kind
        self._stored: dict[tuple[Part, ...], _Stored] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._quantized = 0

    def run(self, graph_module: fx.GraphModule) -> Outcome:
        products, refused = _find(graph_module.graph, self.kind)
        for product in self._quantizable(products, refused):
            if reason := self._replace(product):
                refused.append(f"{product.node.name}: {reason}")
            else:
                self._quantized += len(product.weights)
        return Outcome(self._quantized, tuple(refused))

    def summary(self) -> Quantization:
        copies = {stored.data: stored.weight for stored in self._stored.values()}
        paths = sorted({part.path for parts in self._stored for part in parts})
        floats = {id(tensor): tensor for tensor in map(self.weights.tensor, paths)}
        before, after = sum(t.nbytes for t in floats.values()), sum(w.nbytes for w in copies.values())
        sources = list(map(self.weights.source, paths))
        return Quantization(self.kind, self._quantized, before, after, sources=sources)

    # --- which ------------------------------------------------------------------------------------

    def _quantizable(self, products: list[_Product], refused: list[str]) -> list[_Product]:
        """Those whose weights are quantized wherever a product reads them: the captured graph on dequantized weights
        could not tell one reader from another."""
        while True:
            chosen = {product.node for product in products}
            kept = []
            for product in products:
                reason = _read_otherwise(product, chosen) or self._quantize(product)
                if reason:
                    refused.append(f"{product.node.name}: {reason}")
                else:
                    kept.append(product)
            if len(kept) == len(products):
                return kept
            products = kept

    def _quantize(self, product: _Product) -> str | None:
        """Makes the copies, or says why there can be none."""
        try:
            for parts in product.weights:
                self.weights.of(parts, product.kind)
        except ValueError as error:
            return str(error)
        return None

    # --- replacing --------------------------------------------------------------------------------

    def _replace(self, product: _Product) -> str | None:
        node, op = product.node, _PRODUCTS[product.node.target]
        stored = [self._store(parts, product.kind) for parts in product.weights]
        operands = [self._operands(each, node) for each in stored]
        if op is not ops.gated_mlp:
            quantized = ops.quantized_linear if op is ops.linear else ops.quantized_linear_rope_append
            x, _, *rest = op.bind(*node.args, **node.kwargs)
            return insert(self.graph_module, [node], quantized, x, *operands[0], *rest)
        x, _, _, gate_up_bias, down_bias, activation = op.bind(*node.args, **node.kwargs)

        def build(x: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any) -> Any:
            hidden = ops.quantized_gated_product(x, *gate_up, gate_up_bias, activation)
            return ops.quantized_linear(hidden, *down, down_bias)

        return insert(self.graph_module, [node], build, x, *operands, gate_up_bias, down_bias)

    def _store(self, parts: tuple[Part, ...], kind: Kind) -> _Stored:
        if parts not in self._stored:
            weight = self.weights.of(parts, kind)
            # Tied weights may have a path for each place.
            same = next((stored for stored in self._stored.values() if stored.weight is weight), None)
            if same is None:
                name = f"_quantized_{len(self._stored)}"
                same = _Stored(weight, f"{name}_weight", f"{name}_scales")
                self.graph_module.register_buffer(same.data, weight.data, persistent=False)
                self.graph_module.register_buffer(same.scales, weight.scales, persistent=False)
            self._stored[parts] = same
        return self._stored[parts]

    def _operands(self, stored: _Stored, before: fx.Node) -> tuple[Any, ...]:
        for name in (stored.data, stored.scales):
            if name not in self._nodes:
                self._nodes[name] = _get(self.graph_module, name, before)
        return self._nodes[stored.data], self._nodes[stored.scales], None, stored.weight.kind

    # --- what is right from now on ----------------------------------------------------------------

    def on_dequantized(self, captured: fx.GraphModule) -> fx.GraphModule:
        """The captured graph in which products read dequantized weights; everything else reads what it read."""
        graph = copy_graph(captured.graph)
        rows = {part: found for parts, stored in self._stored.items() for part, found in _rows(parts, stored, self)}
        for node in list(graph.nodes):
            place = {aten.linear.default: 1, aten.addmm.default: 2}.get(node.target)
            parts = _parts(node.args[place]) if place is not None else None
            if parts is None or place is None:
                continue
            if place == 2:
                parts = tuple(part._replace(transposed=not part.transposed) for part in parts)
            if all(part in rows for part in parts):
                found = [rows[part] for part in parts]
                node.update_arg(place, _dequantized(self.graph_module, node, found, transposed=place == 2))
        return fx.GraphModule(self.graph_module, graph)  # whose buffers it needs


def _rows(parts: tuple[Part, ...], stored: _Stored, step: _Step) -> Iterator[tuple[Part, tuple[_Stored, int, int]]]:
    """Where in the copy each part's rows are."""
    start = 0
    for part in parts:
        stop = start + step.weights.tensor(part.path).shape[1 if part.transposed else 0]
        yield part, (stored, start, stop)
        start = stop


def _dequantized(
    module: fx.GraphModule, before: fx.Node, rows: Sequence[tuple[_Stored, int, int]], transposed: bool
) -> fx.Node:
    """The dequantized weight, computed right before the product: no more than one of them is in memory."""
    dtype, found = value(before).dtype, []
    for stored, start, stop in rows:
        data, scales = (_get(module, name, before) for name in (stored.data, stored.scales))
        args = (data, scales, None, stored.weight.kind, start, stop, dtype)
        found.append(_call(before, dequantize_rows, args))
    whole = found[0] if len(found) == 1 else _call(before, aten.cat.default, (found,))
    return _call(before, aten.t.default, (whole,)) if transposed else whole


def _call(before: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    set_value(node)
    return node


def _get(module: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    mode = detect_fake_mode(value(before))
    tensor = module.get_buffer(name)
    node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return node


# --- products that may be quantized ---------------------------------------------------------------


def _find(graph: fx.Graph, kind: Kind) -> tuple[list[_Product], list[str]]:
    """The products of large weights, and why others are none of them."""
    found, refused = [], []
    heads = _heads(graph) if kind == "int4" else set()
    for node in graph.nodes:
        if node.target not in _PRODUCTS:
            refused += _without_form(node)
            continue
        weights = _weights(node)
        parts = [_parts(weight) for weight in weights]
        its_kind: Kind = "int8" if node in heads else kind
        reasons = [_refuse(weight, its_kind) for weight in weights]
        if None in parts:
            refused.append(f"{node.name}: its weight is computed")
        elif reason := next(filter(None, reasons), None):
            refused.append(f"{node.name}: {reason}")
        else:
            found.append(_Product(node, [each for each in parts if each is not None], its_kind))
    return found, refused


def _without_form(node: fx.Node) -> list[str]:
    """Says it of another Op that reads a large matrix: one that fusing should have left apart."""
    op = op_of(node.target)
    if op is None or node.target in _LOOKED_UP:
        return []
    bound = op.bind(*node.args, **node.kwargs)
    matrices = [value(bound[i]) for i in op.weights if isinstance(bound[i], fx.Node)]
    large = any(matrix.dim() == 2 and matrix.numel() >= MIN_ENTRIES for matrix in matrices)
    return [f"{node.name}: {op.name} has no quantized form"] if large else []


def _weights(node: fx.Node) -> list[fx.Node]:
    op = _PRODUCTS[node.target]
    bound = op.bind(*node.args, **node.kwargs)
    return [bound[i] for i in op.weights]


def _refuse(weight: fx.Node, kind: Kind) -> str | None:
    rows, columns = value(weight).shape
    if columns % _COLUMNS[kind]:
        return f"its weight has {columns} columns, of {kind} {_COLUMNS[kind]} are stored together"
    if rows * columns < MIN_ENTRIES:
        return f"its weight has {rows} x {columns} entries, fewer than {MIN_ENTRIES}"
    return None


def _parts(weight: Any) -> tuple[Part, ...] | None:
    """The model's weights that this operand (N, K) is made of; None where it is computed from something else."""
    if not isinstance(weight, fx.Node):
        return None
    if weight.op == "get_attr" and isinstance(weight.meta.get("val"), Tensor):
        return (Part(str(weight.target), False),)
    if weight.target in _TRANSPOSES and weight.meta["val"].dim() == 2:
        source: Any = weight.args[0]
        swaps = weight.target is not aten.permute.default or [d % 2 for d in arguments(weight)["dims"]] == [1, 0]
        return (Part(str(source.target), True),) if source.op == "get_attr" and swaps else None
    if weight.target is aten.cat.default and arguments(weight)["dim"] == 0:
        found = [_parts(part) for part in arguments(weight)["tensors"]]
        return tuple(part for parts in found for part in parts or ()) if None not in found else None
    return None


def _heads(graph: fx.Graph) -> set[fx.Node]:
    """Products that widen, after which there is no other."""
    followed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user.target in _PRODUCTS or user in followed for user in node.users):
            followed.add(node)
    last = [n for n in graph.nodes if n.target is ops.linear.overload and n not in followed]
    return {node for node in last if value(_weights(node)[0]).shape[0] > value(_weights(node)[0]).shape[1]}


def _read_otherwise(product: _Product, chosen: set[fx.Node]) -> str | None:
    """Who else reads one of the product's weights, and not as an embedding or as a product that is quantized too."""
    for node in product.node.graph.nodes:
        if node.op == "get_attr" and node.target in product.paths:
            readers = [final for user in node.users for final in _final_readers(user)]
            other = next((r for r in readers if r not in chosen and r.target not in _LOOKED_UP), None)
            if other is not None:
                return f"{node.target} is also read by {other.name}"
    return None


def _final_readers(user: fx.Node) -> Iterator[fx.Node]:
    if user.target in (*_TRANSPOSES, aten.cat.default):
        for further in user.users:
            yield from _final_readers(further)
    else:
        yield user


def passes_before(fuse: Sequence[Any]) -> list[Any]:
    """Of the passes that fuse, those that the quantized products need as well."""
    return [each for each in fuse if each.name not in OF_FLOAT_PRODUCTS]


def passes_after(fuse: Sequence[Any]) -> list[Any]:
    """Those for the products that stay float."""
    return [each for each in fuse if each.name in OF_FLOAT_PRODUCTS]
