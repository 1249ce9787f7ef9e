"""Calls of an optimized model with torch's jagged nested tensors (B, ragged, ...): served by a Program of their values.

The model is captured on padded inputs, for shapes only; then padding is left out of it, and attention goes by the
offsets. It is verified against the captured graph on one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.capture import CaptureError, Program, capture
from burnish.choose import choose_by_measuring, choose_differentiable, choose_for_new_size
from burnish.ops._nested import longest, offsets_of
from burnish.prepare import Packed, Preparer
from burnish.ragged.masks import Refused
from burnish.ragged.rules import Dims
from burnish.runtime.module import STALE, Call, Entry
from burnish.tuning import Tuner
from burnish.verify import check_outputs, outputs_in_float64, random_node

_STEP = 128
_VERIFIED = 4  # sequences


class NestedCalls:
    """What serves the calls of one model that have nested tensors among their inputs.

    Attributes:
        reasons: why such calls are left to the model as it was, each once.
    """

    def __init__(self, model: nn.Module, preparer: Callable[[], Preparer], tuner: Tuner, verify: bool) -> None:
        self.model, self._preparer, self.tuner, self.verify = model, preparer, tuner, verify
        self.reasons: list[str] = []
        self._made: dict[Any, _Served | None] = {}

    def forget(self) -> None:
        self._made.clear()

    def __call__(self, call: Call, differentiable: bool) -> Any:
        """The result, with the inputs' offsets; STALE where the model itself is to run."""
        nested = [i for i, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor) and leaf.is_nested]
        key = (self.model.training, str(call.structure()), tuple(nested), *map(_kind, call.leaves))
        if key not in self._made:
            try:
                self._made[key] = self._make(call, nested)
            except (CaptureError, Refused, TypeError, ValueError) as error:
                self._made[key] = None
                self.reasons.append(str(error))
        served = self._made[key]
        if served is None:
            return STALE
        result = served(call, differentiable)
        if result is STALE:
            del self._made[key]
        return result

    def _make(self, call: Call, nested: list[int]) -> _Served:
        for i in nested:
            offsets_of(f"input {i}", call.leaves[i], 1)
        # Only their shapes count. (to_padded_tensor pads to all tokens where it does not know the longest sequence.)
        most = max(2, longest(call.leaves[nested[0]]))
        leaves = [
            leaf.values().new_zeros((leaf.shape[0], most, *leaf.shape[2:])) if i in nested else leaf
            for i, leaf in _each(call)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, call.structure())
        program = capture(self.model, args, kwargs)
        packed = self._preparer().prepare_nested(program, [program.inputs[i].name for i in nested])
        served = _Served(packed, program, nested, self.model, self.tuner)
        if self.verify and random_node(program.captured.graph) is None:
            with torch.no_grad():
                served.check(call)
        return served


class _Served:
    def __init__(self, packed: Packed, program: Program, nested: list[int], model: nn.Module, tuner: Tuner) -> None:
        self.packed, self.program, self.nested, self.model, self.tuner = packed, program, nested, model, tuner
        self._entries: dict[Any, Entry] = {}

    def __call__(self, call: Call, differentiable: bool) -> Any:
        first = call.leaves[self.nested[0]]
        offsets = first.offsets()
        for i in self.nested[1:]:
            other = call.leaves[i].offsets()
            if other is not offsets and not torch.equal(other, offsets):
                return STALE
        inner = self._inner(call, first, offsets)
        tokens = inner.leaves[self.nested[0]].shape[0]
        if tokens == 0:
            return STALE
        key = (differentiable, -(-tokens // _STEP) if tokens > 2 else -tokens)
        if key not in self._entries:
            self._entries[key] = self._entry(inner, differentiable)
        result = self._entries[key](inner)
        if result is STALE:
            return result
        flat, spec = pytree.tree_flatten(result)
        most, least = longest(first), first._maybe_min_seqlen
        wrapped = [
            torch.nested.nested_tensor_from_jagged(leaf, offsets, min_seqlen=least, max_seqlen=most)
            if dims != Dims()
            else leaf
            for leaf, dims in zip(flat, self.packed.unpadded.outputs, strict=True)
        ]
        return pytree.tree_unflatten(wrapped, spec)

    def _inner(self, call: Call, first: Tensor, offsets: Tensor) -> Call:
        leaves = [leaf.values() if i in self.nested else leaf for i, leaf in _each(call)]
        tokens = leaves[self.nested[0]].shape[0]
        starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=tokens)
        columns = torch.arange(tokens, device=offsets.device) - starts
        span = torch.empty(longest(first), dtype=torch.int64, device=offsets.device)
        return Call((), {}, [*leaves, columns, offsets.int(), span], None)

    def _entry(self, inner: Call, differentiable: bool) -> Entry:
        prepared = self.packed.prepared
        if differentiable:
            executable, chosen = choose_differentiable(prepared, self.model, inner, self.tuner)
            return prepared.bind(chosen.functions, self.model, executable)
        if prepared.verified:
            chosen = choose_for_new_size(prepared, inner, self.tuner)
        else:
            chosen = choose_by_measuring(prepared, inner, self.tuner)[0]
            prepared.verified = True
        self.tuner.save()
        return prepared.bind(chosen.functions, self.model)

    def check(self, call: Call) -> None:
        """Refused where the result is not what the captured graph computes of each sequence by itself."""
        flat = pytree.tree_leaves(self(call, False), is_leaf=lambda leaf: isinstance(leaf, Tensor))
        parts = [leaf.unbind() for leaf in flat if isinstance(leaf, Tensor) and leaf.is_nested]
        sequences = {i: call.leaves[i].unbind() for i in self.nested}
        for number in range(min(_VERIFIED, len(sequences[self.nested[0]]))):
            one = [sequences[i][number][None] if i in self.nested else leaf for i, leaf in _each(call)]
            if one[self.nested[0]].numel() == 0:
                continue
            eager, true = self.program.captured(*one), outputs_in_float64(self.program.captured, one)
            kinds = self.packed.unpadded.outputs
            expected = [
                [leaf[0] for leaf, dims in zip(values, kinds, strict=True) if dims != Dims()]
                for values in (eager, true)
            ]
            found = [part[number] for part in parts]
            verdict = check_outputs(found, expected[0], expected[1], self.program.computed_in)
            if not verdict.ok:
                raise Refused(f"nested tensors: the outputs differ from those of each sequence: {verdict.reason}")


def _each(call: Call) -> list[tuple[int, Any]]:
    return list(enumerate(call.leaves))


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    rest = tuple(leaf.shape[2:]) if leaf.is_nested else tuple(leaf.shape)
    return leaf.dtype, leaf.device, leaf.dim(), rest
