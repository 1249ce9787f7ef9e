"""What serves calls of one signature without their padding: an entry for each number of tokens, behind one that counts
them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish.prepare import Prepared
from burnish.ragged.rules import Dims
from burnish.ragged.tokens import INPUTS, TokenMemory, Tokens, has_kernel, tokens_of
from burnish.runtime.cuda_graph import GraphPool
from burnish.runtime.module import STALE, Call, Entry

_STEP = 128  # calls whose numbers of tokens are equal when rounded up to it share their choice of Impls on the CPU


Find = Callable[[Sequence[Any]], object]
"""Of a packed Program's flat inputs the last `INPUTS`, the tokens, are written by it, from those before."""

Make = Callable[[Call, Find | None], Entry]
"""Makes the packed Program's entry for a call of it, whose last `INPUTS` are the tokens; `find`, where it is given, is
the first thing that the entry does."""


class PackedEntry:
    """Serves calls of one signature: packs their real tokens, and runs the packed Program's entry for as many.

    A batch without padding is served by the padded Program, and one in which a window would reach over a gap. Not so
    where the packed Program is one of all places: then nobody waits for the device to learn how many tokens are real,
    and to find them is the first kernel of a call's graph.

    Args:
        prepared: the padded Program; its `packed` is what runs.
        padded: makes the padded Program's entry.
        graphs: where entries may be graphs: what they share. The tokens on CUDA then lie at the same places in every
            call, so that nothing is copied to where graphs read them. Without it each call's have memory of their own,
            as gradients want it.
    """

    def __init__(
        self,
        prepared: Prepared,
        padded: Callable[[], Entry],
        make: Make,
        graphs: GraphPool | None = None,
    ) -> None:
        assert prepared.packed is not None
        self.unpadded = prepared.packed.unpadded
        self._of_all_places = prepared.packed.of_all_places and graphs is not None
        self._out_spec = prepared.program.out_spec
        self._make_padded, self._make = padded, make
        self._padded: Entry | None = None
        self._entries: dict[Any, Entry] = {}
        self._graphs = graphs
        # By shapes, since a part of the batch is verified: of the mask, and of all that is given.
        self._memory: dict[tuple[int, ...], TokenMemory] = {}
        self._all_places: dict[tuple[Any, ...], tuple[TokenMemory, Entry]] = {}
        # The pool's own, which graphs take in turn: two locks could be taken in two orders.
        self._lock = threading.RLock() if graphs is None else graphs.lock
        self._last: tuple[int | TokenMemory, int] | None = None  # of the last call: real tokens, and places
        self.not_packed: str | None = None  # why the last call was served padded

    def __call__(self, call: Call) -> Any:
        assert self.unpadded.mask is not None
        shapes = tuple(leaf.shape for leaf in call.leaves if isinstance(leaf, Tensor)) if self._of_all_places else ()
        if shapes in self._all_places:
            return self._serve_all_places(call, *self._all_places[shapes])
        mask = self.unpadded.mask(call.leaves)
        if self._graphs is None or not has_kernel(mask):
            return self._serve(call, mask, tokens_of(mask, ask_contiguous=self.unpadded.windowed))
        with self._lock:  # the tokens stay what they are until what reads them is launched
            self._graphs.enter(mask.device.index)
            if self._of_all_places:
                if shapes not in self._all_places:
                    self._all_places[shapes] = self._made_for_all_places(call, mask)
                return self._serve_all_places(call, *self._all_places[shapes])
            memory = self._memory.get(mask.shape)
            if memory is None:
                memory = self._memory[mask.shape] = TokenMemory(mask)
            return self._serve(call, mask, tokens_of(mask, self.unpadded.windowed, memory=memory))

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Of the last call: real tokens, and places. May wait for the device."""
        if self._last is None:
            return None
        real, places = self._last
        return (real.count() if isinstance(real, TokenMemory) else real), places

    def _made_for_all_places(self, call: Call, mask: Tensor) -> tuple[TokenMemory, Entry]:
        memory, mask_of = TokenMemory(mask, None), self.unpadded.mask
        assert mask_of is not None
        tokens = memory.find(mask)  # Impls are measured on them
        entry = self._make(_with_tokens(call, tokens), lambda leaves: memory.find(mask_of(leaves[: -len(INPUTS)])))
        return memory, entry

    def _serve_all_places(self, call: Call, memory: TokenMemory, entry: Entry) -> Any:
        assert self._graphs is not None
        with self._lock:
            self._graphs.enter(memory.places.device.index)
            self._last, self.not_packed = (memory, memory.places.shape[0]), None
            return entry(_with_tokens(call, memory.all_places))

    def _serve(self, call: Call, mask: Tensor, tokens: Tokens) -> Any:
        assert tokens.real is not None
        self._last, self.not_packed = (tokens.real, mask.numel()), None
        if tokens.real == mask.numel():
            self.not_packed = "there is no padding"
            return self.padded(call)
        if tokens.contiguous is False:
            self.not_packed = "real tokens have gaps between them, which windows count"
            return self._zeroed(self.padded(call), mask)
        inner = _with_tokens(call, tokens)
        count = tokens.places.shape[0]
        key = (count if mask.is_cuda or count <= 2 else -(-count // _STEP), mask.shape)
        entry = self._entries.get(key)
        if entry is None:
            with self._lock:
                entry = self._entries.get(key) or self._make(inner, None)
                self._entries[key] = entry
        return entry(inner)

    def padded(self, call: Call) -> Any:
        with self._lock:
            if self._padded is None:
                self._padded = self._make_padded()
        return self._padded(call)

    def _zeroed(self, result: Any, mask: Tensor) -> Any:
        """With zeros at padding, as packed tokens leave it."""
        if result is STALE:
            return result
        flat = pytree.tree_leaves(result)
        real = mask != 0
        done = [
            leaf.masked_fill(~real.reshape(*real.shape, *(1,) * (leaf.dim() - 2)), 0) if has_tokens(dims) else leaf
            for leaf, dims in zip(flat, self.unpadded.outputs, strict=True)
        ]
        return pytree.tree_unflatten(done, self._out_spec)


def _with_tokens(call: Call, tokens: Tokens) -> Call:
    """A call of the packed Program."""
    return Call((), {}, [*call.leaves, *tokens[: len(INPUTS)]], None)


def has_tokens(dims: Dims) -> bool:
    return (dims.row, dims.position) == (0, 1)


def comparable(outputs: list[Any], kinds: list[Dims], picked: set[int | None], mask: Tensor) -> list[Any]:
    """Of flat outputs what must be equal with padding and without: real tokens, and of each row's values those of rows
    in which all tokens that are taken by position are real."""
    real = mask != 0
    rows = torch.ones_like(real[:, 0])
    for position in picked:
        rows &= real.all(dim=1) if position is None else real[:, position]
    kept = []
    for output, dims in zip(outputs, kinds, strict=True):
        if isinstance(output, Tensor) and has_tokens(dims):
            output = output[real]
        elif isinstance(output, Tensor) and dims.row == 0:
            output = output[rows]
        kept.append(output)
    return kept
