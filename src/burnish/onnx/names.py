"""What inputs, outputs and free sizes are called in the file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from burnish.capture import Program

Axes = Mapping[str, Sequence["str | None"]]

_SYMBOL = re.compile(r"[su]\d+")
_USUAL = ("batch", "sequence")  # of the first two dims


def size_names(program: Program, inputs: Mapping[str, Tensor], axes: Axes) -> dict[str, str]:
    """A word for each symbol among the sizes of the Program's inputs: that of `axes`, by input and dim, where it has
    one, else "batch", "sequence" and the like. A model need not care whether all inputs are of one batch: if these are,
    they are meant to be."""
    words: dict[str, str] = {}
    batch = next((tensor.shape[0] for tensor in inputs.values() if tensor.dim()), None)
    for spec, (name, tensor) in zip((spec for spec in program.inputs if spec.is_tensor), inputs.items(), strict=True):
        given = axes.get(name, (None,) * len(spec.sizes))
        for dim, size in enumerate(spec.sizes):
            if isinstance(size, str) and _SYMBOL.fullmatch(size) and size not in words:
                same_batch = dim == 0 and tensor.shape[0] == batch
                words[size] = given[dim] or ("batch" if same_batch else _word(name, dim, words.values()))
    return words


def _word(name: str, dim: int, taken: Any) -> str:
    usual = _USUAL[dim] if dim < len(_USUAL) else f"{name}_{dim}"
    candidates = (usual, f"{name.partition('_')[0]}_{usual}", f"{name}_{dim}")
    return next(word for word in candidates if word not in taken)


def output_names(program: Program) -> list[str]:
    """Of the outputs that are tensors, in order: "last_hidden_state", "hidden_states.0", "output"."""
    leaves = output_leaves(program)
    numbers = program.out_spec.unflatten(list(range(len(leaves))))
    paths = {number: ".".join(map(_key, path)) for path, number in pytree.tree_flatten_with_path(numbers)[0]}
    return [_spoken(paths[number]) for number, leaf in enumerate(leaves) if is_tensor(leaf)]


def output_leaves(program: Program) -> Sequence[Any]:
    """What the graph returns, flat."""
    (leaves,) = program.graph_module.graph.output_node().args
    assert isinstance(leaves, (tuple, list))
    return leaves


def is_tensor(output: Any) -> bool:
    """Whether a node of the graph has a tensor as its value."""
    return isinstance(output, fx.Node) and isinstance(output.meta.get("val"), Tensor)


def _key(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _spoken(path: str) -> str:
    """Numbers alone, as of a tuple, are no names."""
    return path if path and not path[0].isdigit() else f"output.{path}".rstrip(".")


def name_all(model: ir.Model, program: Program, inputs: Collection[str], words: Mapping[str, str]) -> None:
    """Gives inputs, outputs and free sizes of the model their names."""
    specs = (spec for spec in program.inputs if spec.is_tensor)
    symbols: dict[str, str] = {}
    for value, spec, name in zip(model.graph.inputs, specs, inputs, strict=True):
        value.name = name
        assert value.shape is not None
        for found, size in zip(value.shape, spec.sizes, strict=True):
            if size in words and _SYMBOL.fullmatch(str(found)):
                symbols.setdefault(str(found), words[str(size)])
    for value, name in zip(model.graph.outputs, output_names(program), strict=True):
        value.name = f"output.{name}" if name in inputs else name
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])
    passes.NameFixPass()(model)  # renames what within the graph was called so


def _renamed(size: Any, symbols: Mapping[str, str]) -> Any:
    if isinstance(size, int):
        return size
    if str(size) == "None":
        return None
    text = _SYMBOL.sub(lambda match: symbols.get(match[0], match[0]), str(size))
    return text if set(text) & set("-*/()") else " + ".join(sorted(text.split(" + ")))
