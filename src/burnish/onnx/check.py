"""Whether ONNX Runtime computes from a file what the module does, by the one rule for numbers (`burnish.numerics`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from burnish.capture import Program
from burnish.numerics import check
from burnish.onnx.convert import Converted
from burnish.onnx.difference import first_difference
from burnish.onnx.errors import OnnxError
from burnish.onnx.names import is_tensor, output_leaves, output_names
from burnish.onnx.running import open_session, run
from burnish.verify import check_outputs, outputs_in_float64

_LESS = 3  # another size is so much smaller than the example's, or larger where that is small


@dataclass(frozen=True)
class Checked:
    """One comparison that passed: at these free sizes, the largest error against float64 came to `error`, where
    `allowed` would do and eager PyTorch's own is `eager_error`."""

    sizes: Mapping[str, int]
    error: float
    eager_error: float
    allowed: float


class Sizes:
    """The free sizes of a Program by their words, and inputs of any sizes made of the example's."""

    def __init__(self, program: Program, leaves: Sequence[Any], words: Mapping[str, str]) -> None:
        self._program, self._leaves, self._words = program, leaves, words
        self.example: dict[str, int] = {}
        self._least: dict[str, int] = {}
        for spec, leaf in zip(program.inputs, leaves, strict=True):
            for dim, size in enumerate(spec.sizes):
                if size in words and " + " not in words[str(size)]:
                    self.example[words[str(size)]] = leaf.shape[dim]
                    self._least[words[str(size)]] = spec.limits[dim][0]

    def another(self) -> dict[str, int]:
        """One sample, or a few where the example has one; and shorter sequences, which no model has too few positions
        for."""

        def other(word: str, size: int) -> int:
            if word == "batch":
                return 1 if size > 1 else _LESS
            return size - _LESS if size - _LESS >= self._least[word] else size + _LESS

        return {word: other(word, size) for word, size in self.example.items()}

    def to_check(self, more: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
        """The example's sizes, others, and the example's changed by each of `more`."""
        wanted = [self.example, self.another(), *(self.example | dict(each) for each in more)]
        return [each for i, each in enumerate(wanted) if each not in wanted[:i]]

    def inputs(self, sizes: Mapping[str, int], least: int = 0) -> list[Any]:
        """Copies of the example's inputs, cut or begun again at their ends to fit `sizes`, each at least `least`."""
        words = {word: max(size, least) for word, size in (self.example | dict(sizes)).items()}
        numbers = {symbol: sum(words[part] for part in word.split(" + ")) for symbol, word in self._words.items()}
        return [
            leaf if not spec.is_tensor else _resized(leaf, [_number(size, numbers) for size in spec.sizes])
            for spec, leaf in zip(self._program.inputs, self._leaves, strict=True)
        ]


def _number(size: int | str, numbers: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size in numbers:
        return numbers[size]
    from sympy import sympify  # type: ignore[import-untyped]

    return int(sympify(size).subs(numbers))


def _resized(leaf: Tensor, sizes: Sequence[int]) -> Tensor:
    for dim, size in enumerate(sizes):
        if leaf.shape[dim] != size:
            leaf = leaf.index_select(dim, torch.arange(size, device=leaf.device) % leaf.shape[dim])
    return leaf.detach().clone()  # a view's base would be looked at by export, too


class Checker:
    """Compares a file with the module it was made from."""

    def __init__(self, path: Path, module: nn.Module, program: Program, converted: Converted) -> None:
        try:
            self._session = open_session(path)
        except OnnxError as error:
            raise OnnxError(f"{error}; check=False writes the file without a look at it") from error
        self._module, self._program, self._converted = module, program, converted
        self._names = output_names(program)
        self._tensors = [i for i, leaf in enumerate(output_leaves(program)) if is_tensor(leaf)]

    def check(self, leaves: Sequence[Any], sizes: Mapping[str, int]) -> Checked:
        """OnnxError that names the sizes and the output that differs."""
        at = ", ".join(f"{word} {size}" for word, size in sizes.items()) or "the example's sizes"
        args, kwargs = pytree.tree_unflatten(list(leaves), self._program.in_spec)
        with torch.no_grad():
            original = self._picked(pytree.tree_leaves(self._module(*args, **kwargs)))
            captured = self._picked(pytree.tree_leaves(self._program.captured(*leaves)))
        true = self._picked(outputs_in_float64(self._program.captured, leaves))
        graph = check_outputs(original, captured, true)
        if not graph.ok:
            raise OnnxError(f"at {at} the captured graph computes something else than the module: {graph.reason}")
        result = run(self._session, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        verdicts = []
        for name, *columns in zip(self._names, result, original, true, strict=True):
            verdicts.append(check(*columns))
            if not verdicts[-1].ok:
                where = first_difference(self._converted, self._program, leaves)
                first = f"; the first Op that differs is {where}" if where else ""
                reason = verdicts[-1].reason
                raise OnnxError(f"at {at} ONNX Runtime's {name!r} differs from the module's: {reason}{first}")
        closest = max(verdicts, key=lambda verdict: verdict.error / verdict.allowed if verdict.allowed else 0.0)
        return Checked(dict(sizes), closest.error, closest.eager_error, closest.allowed)

    def _picked(self, leaves: Sequence[Any]) -> list[Any]:
        return [leaves[i] for i in self._tensors]
