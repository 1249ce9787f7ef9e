"""A padded Program's graph -> the same on its real tokens alone, packed into one row: (B, S, ...) becomes (1, T, ...).

Matches: every `attention` with the one key_padding_mask of the batch; operators that keep tokens apart between them.
Replaces: attention by `varlen_attention`. What is computed of integers, masks and buffers only stays padded, it is
cheap, and is gathered where tokens meet it: input ids, positions, rotary tables. Results are put back into their places
at the outputs, zeros elsewhere, and where a model takes tokens by position (`h[:, 0]`).
Source of the method: ByteTransformer, Zhai et al., arXiv:2210.03052.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode

from burnish import ops
from burnish.graph_json import add_symbol
from burnish.ragged.masks import Refused, bound, is_mask, mask_function, mask_of
from burnish.ragged.rules import Dims, NotTokens, Sizes, expression_of, is_vector, picks, why_mixed
from burnish.ragged.tokens import INPUTS, put_back, take
from burnish.rewrites.rewrite import arguments, set_value

aten = torch.ops.aten
_TOKEN_HINT, _LONGEST_HINT = 96, 48


@dataclass
class Unpadded:
    """What `unpad` made.

    Attributes:
        graph_module: takes the padded graph's inputs, then the `INPUTS` of `tokens_of`; of nested inputs their values,
            then `columns`, `cu_seqlens` and `span`. Returns the same outputs, zeros for padding; of nested inputs the
            values.
        mask: for the padded graph's flat inputs, the mask (B, S); None for nested inputs.
        outputs: of each flat output which dimension counts rows and which positions; None where it counts neither.
        picked: positions of which tokens are taken; None among them stands for ones that depend on inputs.
        windowed: whether an attention has a window, so that distances between tokens must be kept.
        attentions: how many there are.
    """

    graph_module: fx.GraphModule
    mask: Callable[[Sequence[Any]], Tensor] | None
    outputs: list[Dims]
    picked: set[int | None] = field(default_factory=set)
    windowed: bool = False
    attentions: int = 0


def unpad(graph_module: fx.GraphModule, nested: Sequence[str] = ()) -> Unpadded:
    """The packed graph. `nested`: names of the inputs that are nested tensors, captured padded; without any the mask
    says which tokens there are. Refused with the reason where a node mixes tokens otherwise than by attention, or where
    there is no mask."""
    return _Unpadding(graph_module, frozenset(nested)).run()


class _Unpadding:
    def __init__(self, graph_module: fx.GraphModule, nested: frozenset[str]) -> None:
        self.source, self.nested = graph_module, nested
        self.attention = [n for n in graph_module.graph.nodes if n.target is ops.attention.overload]
        if not self.attention:
            raise Refused("there is no attention in it whose padding could be left out")
        self.mask = None if nested else self._mask()
        self.sizes = self._sizes()
        self.graph = fx.Graph()
        self.light = self._light()
        self.padded_copies: dict[fx.Node, fx.Node] = {}
        self.packed_copies: dict[fx.Node, fx.Node] = {}
        self.scattered: dict[fx.Node, fx.Node] = {}
        self.made: dict[str, fx.Node] = {}
        self.picked: set[int | None] = set()
        self._dims: dict[fx.Node, Dims] = {}

    def run(self) -> Unpadded:
        output = None
        for node in self.source.graph.nodes:  # in order, so that no recursion is deep
            if node.op == "placeholder":
                self._take(node)
            elif node.op == "output":
                output = node
        self._take_tokens()
        for node in self.source.graph.nodes:  # first, as captured: what fuses products counts on it
            if node.op == "get_attr":
                self.padded(node)
        if not self.nested:
            self._take_indices()
        for node in self.source.graph.nodes:
            if node.op == "call_function" and self.is_packed(node):
                self.packed(node)
        assert output is not None
        (outputs,) = output.args
        results = [self._result(each) for each in outputs]
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.source, self.graph)
        windows = [bound(node)["window"] for node in self.attention]
        return Unpadded(
            module,
            None if self.mask is None else mask_function(self.source, self.mask, self.light),
            [self.dims(each) if isinstance(each, fx.Node) else Dims() for each in outputs],
            self.picked,
            any(window is not None for window in windows),
            len(self.attention),
        )

    # --- what is known of the padded graph ---------------------------------------------------------

    def _mask(self) -> fx.Node:
        found: dict[fx.Node, None] = {}
        for node in self.attention:
            found[mask_of(node)] = None
        if len(found) > 1:
            raise Refused(f"{', '.join(n.name for n in found)}: there are several padding masks")
        return next(iter(found))

    def _sizes(self) -> Sizes:
        if self.mask is not None:
            shape = self.mask.meta["val"].shape
        else:
            inputs = [n for n in self.source.graph.nodes if n.op == "placeholder" and n.target in self.nested]
            shape = inputs[0].meta["val"].shape[:2]
        rows, length = map(expression_of, shape)
        if not (rows.is_symbol and length.is_symbol):
            raise Refused(f"its sizes ({rows}, {length}) are fixed")
        if rows == length:
            raise Refused("its batch size and its length are one")
        return Sizes(rows, length)

    def _light(self) -> set[fx.Node]:
        """What is computed of integers, masks and buffers only."""
        light: set[fx.Node] = set()
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                found = node.meta.get("val")
                if str(node.target) not in self.nested and not (
                    isinstance(found, Tensor) and found.is_floating_point()
                ):
                    light.add(node)
            elif node.op == "get_attr":
                if not isinstance(_attribute(self.source, str(node.target)), nn.Parameter):
                    light.add(node)
            elif node.op == "call_function" and light.issuperset(
                n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))
            ):
                light.add(node)
        return light

    def dims(self, node: Any) -> Dims:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return Dims()
        if node not in self._dims:
            found = node.meta["val"]
            parts = found if isinstance(found, (list, tuple)) else [found]
            try:
                every = [self.sizes.dims(part) for part in parts if isinstance(part, Tensor)]
            except NotTokens as error:
                raise Refused(f"{node.name}: {error}") from None
            self._dims[node] = every[0] if every else Dims()
        return self._dims[node]

    def is_packed(self, node: fx.Node) -> bool:
        """Whether it has a value for each token that is computed on packed tokens."""
        return node not in self.light and self.dims(node).has_positions

    # --- the new graph ------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        try:
            set_value(new)
        except (TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{(like or new).name}: {str(error).splitlines()[0]}") from None
        if like is not None:
            new.meta |= {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
        return new

    def _take(self, node: fx.Node) -> None:
        new = self.graph.placeholder(str(node.target))
        new.meta = {key: value for key, value in node.meta.items() if key != "origin"}
        if node.target in self.nested:
            fake = node.meta["val"]
            new.meta["val"] = fake.new_empty((self.tokens_size, *fake.shape[2:]))
        self.padded_copies[node] = new

    @property
    def tokens_size(self) -> Any:
        """T, as a size of fake tensors."""
        if not hasattr(self, "_tokens_size"):
            mode = self._mode()
            self._tokens_size = add_symbol(mode.shape_env, _TOKEN_HINT)
            self._offsets_size = add_symbol(mode.shape_env, _TOKEN_HINT + 1)
        return self._tokens_size

    def _mode(self) -> Any:
        values = [n.meta["val"] for n in self.source.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        return detect_fake_mode(values)

    def _take_tokens(self) -> None:
        device = self.attention[0].meta["val"].device
        tokens = self.tokens_size
        sizes = {"cu_seqlens": self._offsets_size}
        if self.nested:
            sizes["span"] = add_symbol(self._mode().shape_env, _LONGEST_HINT)
        else:
            assert self.mask is not None
            rows, length = self.mask.meta["val"].shape
            sizes["sources"] = rows * length
        for name in ("columns", "cu_seqlens", "span") if self.nested else INPUTS:
            new, size = self.graph.placeholder(f"burnish_{name}"), sizes.get(name, tokens)
            with self._mode():
                dtype = torch.int32 if name in ("cu_seqlens", "sources") else torch.int64
                new.meta["val"] = torch.empty(size, dtype=dtype, device=device)
            self.made[name] = new

    def once(self, name: str, make: Callable[[], fx.Node]) -> fx.Node:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def length(self) -> fx.Node:
        """S."""
        if self.nested:
            return self.once("length", lambda: self.call(aten.sym_size.int, self.made["span"], 0))
        mask = self.mask
        assert mask is not None
        return self.once("length", lambda: self.call(aten.sym_size.int, self.padded(mask), 1))

    def rows(self) -> fx.Node:
        """B."""
        if self.nested:
            offsets = self.made["cu_seqlens"]
            return self.once("rows", lambda: self.call(operator.sub, self.call(aten.sym_size.int, offsets, 0), 1))
        mask = self.mask
        assert mask is not None
        return self.once("rows", lambda: self.call(aten.sym_size.int, self.padded(mask), 0))

    def tokens(self) -> fx.Node:
        """T."""
        return self.once("tokens", lambda: self.call(aten.sym_size.int, self.made["columns"], 0))

    def all_places(self) -> fx.Node:
        """B * S."""
        return self.once("all places", lambda: self.call(operator.mul, self.rows(), self.length()))

    def row_of_token(self) -> fx.Node:
        if self.nested:
            raise Refused("a value for each row meets nested tokens")
        return self.once(
            "rows of tokens",
            lambda: self.call(aten.div.Scalar_mode, self.made["nearest"], self.length(), rounding_mode="floor"),
        )

    # --- values as they are in the padded graph -----------------------------------------------------

    def padded(self, node: fx.Node) -> fx.Node:
        if node in self.padded_copies:
            return self.padded_copies[node]
        if node.target is aten.sym_size.int and str(node.all_input_nodes[0].target) in self.nested:
            self.padded_copies[node] = self._size_of_nested(node)
            return self.padded_copies[node]
        picked = picks(node, self.dims)
        copies = {}
        for source in node.all_input_nodes:
            if self.is_packed(source):
                if node.target is aten.sym_size.int:
                    return self._number(node, False)
                if not picked and not self._vanishes(source):
                    raise Refused(f"{node.name}: {why_mixed(node, self.dims) or 'its tokens go'}")
                copies[source] = self.scatter(source)
            else:
                copies[source] = self.padded(source)
        if picked and self.is_packed(node.all_input_nodes[0]):
            self._note_picked(node)
        new = self.graph.node_copy(node, copies.__getitem__)
        new.meta = {key: value for key, value in node.meta.items() if key != "origin"}
        if any(self.is_packed(source) for source in node.all_input_nodes) or self.nested:
            set_value(new)
        self.padded_copies[node] = new
        return new

    def _size_of_nested(self, node: fx.Node) -> fx.Node:
        source, dim = node.args
        if dim == 0 or dim == 1:
            return self.length() if dim else self.rows()
        return self.call(aten.sym_size.int, self.padded(source), int(dim) - 1)  # type: ignore[arg-type]

    def _note_picked(self, node: fx.Node) -> None:
        index = arguments(node).get("index") if node.target is aten.select.int else None
        self.picked.add(index if isinstance(index, int) else None)

    def _vanishes(self, node: fx.Node) -> bool:
        """Whether the value is known to be zero at padding: multiplied by the mask."""
        if node.target is not aten.mul.Tensor:
            return False
        return self.mask is not None and any(is_mask(factor, self.mask) for factor in node.args)

    def scatter(self, node: fx.Node) -> fx.Node:
        """Packed tokens back in their places, zeros elsewhere."""
        if self.nested:
            raise Refused(f"{node.name}: tokens of nested tensors are taken by position")
        if node not in self.scattered:
            dims, packed = self.dims(node), self.packed(node)
            if (dims.row, dims.position) != (0, 1):
                raise Refused(f"{node.name}: its shape does not start with rows and positions")
            flat = self.call(aten.squeeze.dim, packed, 0)
            given = (self.made["places"], self.made["sources"], self.rows(), self.length())
            self.scattered[node] = self.call(put_back, flat, *given, like=node)
        return self.scattered[node]

    # --- values of packed tokens --------------------------------------------------------------------

    def packed(self, node: fx.Node) -> fx.Node:
        """The value for packed tokens of one that has rows or positions among its dimensions."""
        if node not in self.packed_copies:
            self.packed_copies[node] = self._packed(node)
        return self.packed_copies[node]

    def _packed(self, node: fx.Node) -> fx.Node:
        if not self.is_packed(node):
            return self._gathered(node)
        if node.op == "placeholder":
            copy = self.padded(node)
            return self.call(aten.unsqueeze.default, copy, 0) if self.nested else self._gather(copy, self.dims(node))
        if node.target is ops.attention.overload:
            return self._attention(node)
        if reason := why_mixed(node, self.dims):
            raise Refused(f"{node.name}: {reason}")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        return self.call(node.target, *args, like=node, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return self._number(node)
        dims = self.dims(node)
        return self.packed(node) if dims.of_tokens else self.padded(node)

    def _number(self, node: fx.Node, packed: bool = True) -> Any:
        """A size: of one row of T tokens."""
        found = node.meta["val"]
        if isinstance(found, torch.SymInt) and self.sizes.is_in(expression := expression_of(found)):
            sizes = {self.sizes.rows: self.rows, self.sizes.length: self.length,
                     self.sizes.rows * self.sizes.length: self.all_places}  # fmt: skip
            if packed:
                if expression == self.sizes.rows:
                    return 1
                if expression in sizes:
                    return self.tokens()
            elif expression in sizes:
                return sizes[expression]()
            raise Refused(f"{node.name}: the size {expression} is not understood")
        return self.padded(node)

    def _take_indices(self) -> None:
        """Gathers token ids, positions and what else of integers tokens meet: all at once."""
        found: dict[fx.Node, bool] = {}
        for node in self.source.graph.nodes:
            if node.op == "call_function" and self.is_packed(node) and node.target is not ops.attention.overload:
                light = (n for n in node.all_input_nodes if n in self.light)
                found |= {n: self.dims(n).row is None for n in light if is_vector(n, self.dims)}
        if len(found) < 2:
            return
        flat = [self.call(aten.flatten.using_ints, self.padded(node), 0, -1) for node in found]
        taken = self.call(take, self.made["nearest"], self.made["columns"], flat, list(found.values()))
        for i, node in enumerate(found):
            new = self.call(operator.getitem, taken, i)
            one_row = node.meta["val"].dim() == 2
            self.packed_copies[node] = self.call(aten.unsqueeze.default, new, 0) if one_row else new

    def _gathered(self, node: fx.Node) -> fx.Node:
        """A value that stays padded, for each token: by its row, its position, or both."""
        return self._gather(self.padded(node), self.dims(node), node)

    def _gather(self, copy: fx.Node, dims: Dims, like: fx.Node | None = None) -> fx.Node:
        if dims.row is not None and dims.position is not None:
            if dims.row != 0 or dims.position < dims.row:
                raise Refused(f"{copy.name}: its first dimension does not count rows")
            if dims.position != 1:
                copy = self.call(aten.movedim.int, copy, dims.position, 1)
            flat = self.call(aten.flatten.using_ints, copy, 0, 1)
            new = self.call(aten.unsqueeze.default, self._select(flat, 0, self.made["nearest"]), 0)
            return new if dims.position == 1 else self.call(aten.movedim.int, new, 1, dims.position)
        if dims.position is not None:
            return self._select(copy, dims.position, self.made["columns"])
        if dims.both is not None:
            return self._select(copy, dims.both, self.made["nearest"])
        shape = copy.meta["val"].shape
        if dims.row != 0 or len(shape) < 2 or shape[1] != 1:
            raise Refused(f"{copy.name}: a value for each row does not spread over its tokens")
        return self.call(aten.transpose.int, self._select(copy, 0, self.row_of_token()), 0, 1)

    def _select(self, source: fx.Node, dim: int, index: fx.Node) -> fx.Node:
        return self.call(aten.index_select.default, source, dim, index)

    def _attention(self, node: fx.Node) -> fx.Node:
        given = bound(node)
        q, k, v = (given[name] for name in "qkv")
        expected = Dims(row=0, position=2)
        if any(self.dims(t) != expected for t in (q, k, v)):
            raise Refused(f"{node.name}: its queries are of other tokens than its keys")
        if self.nested and (given["bias"] is not None or given["key_padding_mask"] is not None):
            raise Refused(f"{node.name}: the attention has a mask")
        if given.get("dropout_p"):
            raise Refused(f"{node.name}: the attention has dropout")
        rows = [self.call(aten.transpose.int, self.call(aten.squeeze.dim, self.packed(t), 0), 0, 1) for t in (q, k, v)]
        out = self.call(
            ops.varlen_attention.overload, *rows, self.made["cu_seqlens"], None, self.length(), self.length(),
            given["is_causal"], given["window"], given["scale"], like=node,
        )  # fmt: skip
        return self.call(aten.unsqueeze.default, self.call(aten.transpose.int, out, 0, 1), 0)

    # --- outputs ------------------------------------------------------------------------------------

    def _result(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if not self.is_packed(node):
            if self.nested and self.dims(node).of_tokens:
                raise Refused(f"{node.name}: an output has a value for each row")
            return self.padded(node)
        if self.nested:
            if (self.dims(node).row, self.dims(node).position) != (0, 1):
                raise Refused(f"{node.name}: its shape does not start with rows and positions")
            return self.call(aten.squeeze.dim, self.packed(node), 0)
        return self.scatter(node)


def _attribute(graph_module: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)
